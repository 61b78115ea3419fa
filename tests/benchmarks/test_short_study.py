"""The short study: its tables by hand, process time, and that the pages have the figures of the committed results."""

import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from benchmarks.short_study import GRADIENT, JPEG, process_seconds
from benchmarks.short_study_tables import gradient_table, held_out_table
from benchmarks.study import read_results

RESULTS = Path("docs/short_study.jsonl")
STATISTICS = {"dark_share": 0.0, "sharpness": 1000.0, "entropy": 4.0, "diversity": None}


def result(seed: int, seconds: float) -> dict[str, Any]:
    return {
        "setting": "dgpo",
        "seed": seed,
        "images": 320,
        "round_images": 64,
        "process_seconds_per_image": seconds,
        "rounds": [{"reward/mean": -2.0}, {"reward/mean": -1.5}],
        "held_out": {
            "reward_before": -2.0,
            "reward_after": -1.8 + seed / 10,
            "paired_standard_error": 0.05,
            "named_before": 1.0,
            "named_after": 0.75,
            "kept": 0.75,
            "statistics_before": STATISTICS,
            "statistics_after": {**STATISTICS, "sharpness": 500.0},
        },
    }


def test_tables_by_hand() -> None:
    runs = [result(0, 0.125), result(1, 0.375)]
    # Changes of 0.2 and 0.3 of 2; the smaller is 4 standard errors. The median cost is 0.25 s an image.
    line = "| `dgpo` | +10.0, +15.0 % | +12.5 % | 4.0 | 0.75, 0.75 | 0.250 |"
    assert held_out_table(runs).splitlines()[2] == line
    line = "| dgpo | -2 → -1.8, -2 → -1.7 | 4.0, 6.0 | 1.00 → 0.75, 1.00 → 0.75 | 0.00 → 0.00 / 1000 → 500 / 4.00 → 4.00 | 80 |"
    assert gradient_table(runs).splitlines()[2] == line


def test_process_time_counts_work_and_not_waiting() -> None:
    script = (
        "import time\n"
        "def work():\n"
        "    end = time.process_time() + 0.2\n"
        "    while time.process_time() < end: pass\n"
        "print('round 1', flush=True); work(); print('a line', flush=True); print('round 2', flush=True)\n"
        "time.sleep(0.6); print('round 3', flush=True); time.sleep(0.2)\n"
    )
    log = StringIO()
    first, second, third = process_seconds([sys.executable, "-c", script], log)
    assert second - first > 0.15 and third - second < 0.15
    assert log.getvalue().split("\n")[1] == "a line"
    with pytest.raises(subprocess.CalledProcessError):
        process_seconds([sys.executable, "-c", "raise SystemExit(3)"], log)


@pytest.mark.parametrize(
    ("settings", "table", "page"),
    [(JPEG, held_out_table, "docs/algorithms.md"), (GRADIENT, gradient_table, "docs/differentiable_rewards.md")],
)
def test_the_committed_results_give_the_figures_of_the_pages(settings: tuple[str, ...], table: Any, page: str) -> None:
    results = [each for each in read_results(RESULTS) if each["setting"] in settings]
    assert results
    text = Path(page).read_text()
    assert [row for row in table(results).splitlines()[2:] if row not in text] == []

"""The terminal: one plain line per round without a terminal, otherwise a bar that resumes at the right round."""

import dataclasses
import io
import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trackers import terminal
from ray_ddpo.common.trackers.terminal import Terminal, TimeLeft, stats_line
from ray_ddpo.common.trackers.tracker import RunInfo

METRICS = {"reward/mean": 1.23456, "images_per_second": 5.678}


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> RunInfo:
    return RunInfo("tiny", tmp_path, recipe.model_dump(), 20, 0)


def test_the_first_line_tells_the_settings(run: RunInfo, capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().start(run)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("tiny: 20 rounds of 8 images, policy stable_diffusion /")
    assert line.endswith(f"reward jpeg_compressibility, algorithm ddpo_is, in {run.folder}")


def test_the_first_line_tells_all_rewards_and_where_a_resumed_run_goes_on(
    tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del tables["reward"]
    tables["rewards"] = [{"name": "jpeg_compressibility", "weight": 0.1}, {"name": "aesthetic"}]
    Terminal().start(RunInfo("tiny", tmp_path, Recipe.parse(tables).model_dump(), 20, 6))
    (line,) = capsys.readouterr().out.splitlines()
    assert "20 rounds of 8 images from round 7," in line and "reward jpeg_compressibility + aesthetic," in line


def test_a_round_is_one_plain_line_where_output_is_no_terminal(
    run: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    live = Terminal().start(run)
    capsys.readouterr()
    live.log({"round": 2.0, **METRICS})
    live.finish()
    assert capsys.readouterr().out == "round 3/20  reward 1.235  5.68 images/s  0:00:00 left\n"


def test_the_mfu_is_behind_the_throughput_if_it_is_known(run: RunInfo, capsys: pytest.CaptureFixture[str]) -> None:
    live = Terminal().start(run)
    capsys.readouterr()
    live.log({"round": 2.0, **METRICS, "mfu/sampler": 0.456, "mfu/learner": 0.4})
    live.finish()
    line = "round 3/20  reward 1.235  5.68 images/s (MFU sampling 46 %, learning 40 %)  0:00:00 left\n"
    assert capsys.readouterr().out == line


def test_preferences_and_groups_that_a_refill_lacks_are_shown() -> None:
    line = stats_line({**METRICS, "preference_accuracy": 0.834}, timedelta(0))
    assert line == "reward 1.235  preference accuracy 83 %  5.68 images/s  0:00:00 left"
    lacking = {"refill/lacking": 2.0, "reward/zero_std_groups": 0.25}
    line = stats_line({**METRICS, **lacking}, timedelta(0))
    assert line == "reward 1.235 (2 groups lack different rewards after the refill)  5.68 images/s  0:00:00 left"


def test_one_round_is_not_plural(run: RunInfo, capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().start(dataclasses.replace(run, rounds=1))
    assert "tiny: 1 round of 8 images" in capsys.readouterr().out


@pytest.mark.parametrize("keys", [{"warmup_steps": 5}, {"learning_rate_schedule": "linear", "decay_steps": 9}])
def test_the_learning_rate_is_shown_if_it_changes(
    tables: dict, keys: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, shown in ((keys, "  learning rate 1.23e-05"), ({}, "")):
        recipe = Recipe.parse({**tables, "learner": {**tables["learner"], **changes}})
        live = Terminal().start(RunInfo("tiny", tmp_path, recipe.model_dump(), 20, 0))
        capsys.readouterr()
        live.log({"round": 2.0, **METRICS, "learning_rate": 1.2345e-5})
        line = f"round 3/20  reward 1.235{shown}  5.68 images/s  0:00:00 left\n"
        assert capsys.readouterr().out == line


def test_time_left_is_the_mean_round_time_since_this_start_times_rounds_left(
    run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    resumed = RunInfo(run.name, run.folder, run.recipe, rounds=20, first_round=10)
    # Three rounds, 10 to 12, took 30 s; seven are to come.
    assert TimeLeft(resumed).after(rounds_done=13) == timedelta(seconds=70)


def test_a_terminal_gets_a_bar_with_the_same_stats(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    live = Terminal().start(run)
    live.log({"round": 2.0, **METRICS})
    live.finish()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    last = [line for line in shown.splitlines() if line.strip()][-1]
    assert last.startswith("round 3/20") and "reward 1.235  5.68 images/s" in last and last.rstrip().endswith("left")
    assert screen.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_the_spread_within_groups_and_saturation_are_shown() -> None:
    spread = METRICS | {"reward/group_std": 0.0456, "reward/saturation": 0.75}
    expected = "reward 1.235 ± 0.046 in a group (75 % of images have the best reward)  5.68 images/s  0:00:00 left"
    assert stats_line(spread, timedelta(0)) == expected
    assert "best" not in stats_line(spread | {"reward/saturation": 0.25}, timedelta(0))

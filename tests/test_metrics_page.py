"""docs/metrics.md and what a run logs are compared both ways, so that neither can fall behind."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trackers.ray_metrics import RaySeries, series_of
from ray_ddpo.train import run_training

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


@dataclass(frozen=True)
class Row:
    """A row of one of the page's tables."""

    metric: str
    meaning: str
    unit: str
    logged: str
    on_ray: str

    def describes(self, name: str) -> bool:
        """Return True if `name` is this metric, with any text in the place of each `<part>`."""
        parts = re.split(r"<\w+>", self.metric)
        return re.fullmatch(".+".join(re.escape(part) for part in parts), name) is not None


def rows() -> list[Row]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [Row(metric.strip("`"), *others) for metric, *others in cells]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> set[str]:
    """Return the names that a small serial run logs."""
    tables = {
        "name": "tiny",
        "output_dir": str(tmp_path_factory.mktemp("runs")),
        "rounds": 1,
        "policy": {"name": "stable_diffusion", "model": str(tiny_model)},
        "prompts": {"name": "set", "set": "shapes"},  # with categories
        "sampling": {"num_steps": 4, "batch_size": 4, "batches_per_round": 1},
        "reward": {"name": "jpeg_compressibility"},
        "algorithm": {"name": "ddpo_is"},
        "learner": {"batch_size": 4, "micro_batch_size": 8},
        "evaluation": {"every": 1, "images": 4, "scorers": [{"name": "brightness"}], "ema_decay": 0.5},
    }
    recipe = Recipe.parse(tables)
    run_training(recipe, serial=True)
    return set(json.loads((Path(recipe.run_path()) / "metrics.jsonl").read_text()))


def test_every_logged_metric_has_one_row(logged: set[str]) -> None:
    found = {name: [row.metric for row in rows() if row.describes(name)] for name in logged}
    assert {name: metrics for name, metrics in found.items() if len(metrics) != 1} == {}


def test_evaluation_metrics_are_logged(logged: set[str]) -> None:
    expected = [row for row in rows() if row.logged == "only when an evaluation is read"]
    assert len(expected) == 8 and "evaluation/brightness/average_mean" in logged
    assert "evaluation/brightness/category/single_object" in logged
    assert [row.metric for row in expected if not any(row.describes(name) for name in logged)] == []


def test_metrics_documented_for_every_round_are_logged_in_every_round(logged: set[str]) -> None:
    expected = [row for row in rows() if row.logged == "every round"]
    assert len(expected) > 30
    assert [row.metric for row in expected if not any(row.describes(name) for name in logged)] == []


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.metric)
def test_a_row_has_meaning_unit_and_time_of_logging(row: Row) -> None:
    assert row.meaning and row.unit
    assert row.logged == "every round" or row.logged.startswith("only when ")


def as_prometheus_shows(series: RaySeries) -> str:
    tags = sorted(set(series.tags) - {"index"})
    name = f"ray_{series.name}" + ("_total" if series.kind == "counter" else "") + (f"{{{tags[0]}}}" if tags else "")
    return f"`{name}`" + (" (histogram)" if series.kind == "histogram" else "")


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.metric)
def test_a_row_names_the_metric_as_ray_exports_it(row: Row) -> None:
    # A part in <> would lose its brackets to the rules for names: it goes through them between capitals.
    series = series_of(re.sub(r"<(\w+)>", r"A\1Z", row.metric))
    shown = ", ".join(as_prometheus_shows(one) for one in series) or "–"
    assert re.sub(r"A(\w+?)Z", r"<\1>", shown) == row.on_ray

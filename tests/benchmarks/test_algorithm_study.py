"""The algorithm study and the short study: their runs, their tables, and that every algorithm is included."""

import csv
from pathlib import Path

import pytest
import tomli_w

from benchmarks.algorithm_study import ALGORITHMS as STUDIED
from benchmarks.algorithm_study import SEEDS, all_runs, draw_chart, table, write_csv
from benchmarks.algorithm_study_costs import COSTS, measure, read_costs
from benchmarks.short_study import all_runs as short_runs
from benchmarks.short_study import jpeg_runs
from benchmarks.study import StudyRun, read_results
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import without_none
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.algorithms import ALGORITHMS


def result(setting: str, seed: int, rewards: list[float]) -> dict:
    seconds = {"seconds/sample": 4.0, "seconds/score": 1.0, "seconds/learn": 3.0}
    return {
        "setting": setting,
        "seed": seed,
        "images": 64 * len(rewards),
        "round_images": 64,
        "rounds": [{"reward/mean": reward, "clip_fraction": 0.25, **seconds} for reward in rewards],
        "held_out": {
            "reward_before": -2.0,
            "reward_after": -1.8 + seed / 10,
            "paired_standard_error": 0.05,
            "scorers": {"animal_classifier": {"kept": 0.75}},
        },
    }


WINDOWS = {"window", "mixgrpo"}  # whose rounds are cheaper


@pytest.mark.parametrize(("runs", "images"), [(all_runs(), 768), (jpeg_runs(), 320)])
def test_every_algorithm_of_a_study_has_three_seeds_and_equally_many_images(runs: list[StudyRun], images: int) -> None:
    assert len(runs) == len({run.name for run in runs}) and {run.seed for run in runs} == set(SEEDS) and len(SEEDS) >= 3
    recipes = {run.setting: Recipe.load(run.recipe, list(run.overrides)) for run in runs}
    drawn = {name: recipe.rounds * recipe.images_per_round for name, recipe in recipes.items()}
    assert {number for name, number in drawn.items() if name not in WINDOWS} == {images}
    assert all(run.images == drawn[run.setting] for run in runs)


def test_every_algorithm_is_in_a_study() -> None:
    runs = [*all_runs(), *short_runs()]
    studied = {build_components(Recipe.load(run.recipe, list(run.overrides))).recipe.algorithm.name for run in runs}
    # draft_lv is DRaFT on the last step, and on noised versions of the image.
    assert studied == set(ALGORITHMS) - {"draft_lv"}


def test_table_csv_and_chart_by_hand(tmp_path: Path) -> None:
    runs = [result("ddpo_is", seed, [-2.0, -1.5]) for seed in (0, 1)]
    costs = {"ddpo_is": 0.125}
    # changes of 0.2 and 0.3 of 2; the smaller is 4 standard errors
    line = "| `ddpo_is` | 128 | +10.0, +15.0 % | +12.5 % | 4.0 | 0.75, 0.75 | 25 % | 0.125 |"
    assert table(runs, costs).splitlines()[2] == line
    write_csv(runs, tmp_path / "study.csv", costs)
    rows = list(csv.DictReader((tmp_path / "study.csv").open()))
    assert rows[1] == {"algorithm": "ddpo_is", "seed": "0", "images": "128", "seconds": "16.0", "reward": "-1.5000"}
    assert len(rows) == 4
    draw_chart(runs, tmp_path / "chart.png", costs)
    assert (tmp_path / "chart.png").stat().st_size > 10_000


@pytest.mark.thorough
def test_an_image_costs_more_with_more_inner_epochs(tables: dict, tmp_path: Path) -> None:
    tables["sampling"] |= {"batches_per_round": 1}
    recipes = {}
    for name, epochs in (("once", 1), ("often", 6)):
        recipes[name] = str(tmp_path / f"{name}.toml")
        learner = {**tables["learner"], "inner_epochs": epochs}
        Path(recipes[name]).write_text(tomli_w.dumps(without_none({**tables, "learner": learner})))
    costs = measure(recipes, tmp_path / "costs.json", repeats=1)
    assert costs == read_costs(tmp_path / "costs.json") and costs["often"] > costs["once"] > 0


def test_the_committed_results_give_the_figures_of_the_page() -> None:
    rows = table(read_results(Path("docs/algorithm_study.jsonl")), read_costs(COSTS)).splitlines()[2:]
    page = Path("docs/algorithms.md").read_text()
    assert {row.split(" | ")[0].strip("| `") for row in rows} == set(STUDIED)
    for row in rows:
        name, _, changes, mean, *_ = row.split(" | ")
        assert f"{name} | {changes} | {mean} |" in page, row

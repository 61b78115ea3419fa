"""The lag study: its list of runs, its clock, and that existing runs are not repeated."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.lag_study import IMAGES, SEEDS, all_runs, main, setting_parts
from benchmarks.lag_study_chart import curve, paces, round_seconds, seconds_an_image, table
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components


def result(setting: str, seed: int, round_images: int, rewards: list[float]) -> dict:
    seconds = {"seconds/sample": 8.0, "seconds/score": 1.0, "seconds/learn": 6.0}
    return {
        "setting": setting,
        "seed": seed,
        "images": round_images * len(rewards),
        "round_images": round_images,
        "tasks": round_images // 16,
        "correction": setting.split("-")[2],
        "lag": int(setting.split("-")[1].removeprefix("lag")),
        "rounds": [{"reward/mean": reward, "clip_fraction": 0.25, **seconds} for reward in rewards],
        "held_out": {
            "reward_before": -2.0,
            "reward_after": -1.5 - seed / 10,
            "scorers": {"animal_classifier": {"kept": 0.75}},
        },
    }


def test_at_most_sixty_runs_sample_equally_many_images() -> None:
    runs = all_runs(IMAGES)
    assert len(runs) == len({run.name for run in runs}) <= 60
    for run in runs:
        recipe = build_components(Recipe.load(run.recipe, list(run.overrides))).recipe
        assert recipe.rounds * recipe.images_per_round == IMAGES
        assert recipe.runtime.threads == 1 and recipe.evaluation.split == "tuning"
        assert (
            recipe.images_per_round // recipe.learner.images_per_step
            == {"large": 4, "middle": 2, "small": 1}[setting_parts(run.setting)[0]]
        )
        assert recipe.max_policy_lag == setting_parts(run.setting)[1]


def test_a_tier_runs_with_all_seeds_before_the_next_tier() -> None:
    runs = all_runs(IMAGES)
    first = [run.setting for run in runs[:4]]
    assert first == ["large-lag0-plain", "large-lag1-plain", "large-lag2-plain", "large-lag0-parts"]
    assert [(run.setting, run.seed) for run in runs[:12]] == [(setting, seed) for seed in SEEDS for setting in first]
    assert {run.setting for run in runs[12:21]} == {"small-lag0-plain", "small-lag1-plain", "small-lag2-plain"}
    assert {run.setting for run in runs[21:27]} == {"large-lag1-proximal", "large-lag2-proximal"}


@pytest.mark.parametrize(
    ("lag", "samplers", "seconds"),
    [
        (0, 1, 8 + 1 / 4 + 6),  # one after the other
        (0, 4, 2 + 1 / 4 + 6),
        (1, 1, 8.0),  # the samplers hold it up
        (1, 4, 6.0),  # the learner does
        (2, 1, 8.0),
    ],
)
def test_a_rounds_time_by_hand(lag: int, samplers: int, seconds: float) -> None:
    assert round_seconds(8, 1, 6, lag, (samplers, 4, 1)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("samplers", "parts", "seconds"),
    [
        (1, 4, 8 + 1 / 4 + 6 / 4),  # drawing holds it up: a task takes 2, a part's update 1.5
        (1, 2, 8 + 1 / 4 + 6 / 2),
        (4, 4, 2 + 1 / 4 + 6),  # all tasks come at once
        (2, 4, 2 + 1 / 4 + 6),  # the parts of the second wave wait for those of the first
    ],
)
def test_a_round_in_parts_by_hand(samplers: int, parts: int, seconds: float) -> None:
    assert round_seconds(8, 1, 6, 0, (samplers, 4, parts)) == pytest.approx(seconds)


def test_all_runs_share_the_time_per_image_except_for_corrections() -> None:
    quiet, loaded = (result("large-lag0-plain", 0, 64, [1.0] * 3) for _ in range(2))
    loaded["rounds"] = [{**metrics, "seconds/learn": 60.0} for metrics in loaded["rounds"][:1]]
    in_parts, masked = result("large-lag0-parts", 0, 64, [1.0]), result("large-lag1-mask", 0, 64, [1.0])
    masked["rounds"][0]["seconds/learn"] = 90.0  # the machine was busy then
    shared = (8 / 64, 1 / 64)
    expected = {"plain": (*shared, 6 / 64), "parts": (*shared, 6 / 64), "mask": (*shared, 9 / 64)}
    assert paces([quiet, loaded, in_parts, masked], {"plain": 1.0, "mask": 1.5}) == expected


def test_at_lag_one_a_round_takes_at_least_half_the_time_of_lag_zero() -> None:
    assert round_seconds(5, 4, 5, 1, (1, 1, 1)) == pytest.approx(7)  # (5 + 4 + 5) / 2 is more than any part


def test_a_curve_is_the_mean_of_the_last_sixty_four_images() -> None:
    images, means = curve(result("small-lag0-plain", 10, 16, [1, 2, 3, 4, 5, 6]))
    assert images.tolist() == [64, 80, 96] and means.tolist() == [2.5, 3.5, 4.5]
    images, means = curve(result("large-lag0-plain", 10, 64, [1, 2]))
    assert images.tolist() == [64, 128] and means.tolist() == [1, 2]


def test_a_table_line_by_hand() -> None:
    runs = [result("large-lag0-plain", seed, 64, [1.0, 2.0]) for seed in (0, 1)]
    line = table(runs, 1, {}).splitlines()[2]
    seconds = (8 + 1 / 4 + 6) / 64
    assert line == f"| large-lag0-plain | +25.0, +20.0 % | +22.5 % | 0.75, 0.75 | 25 % | – | {seconds:.3f} |"
    assert seconds_an_image(runs[0], paces(runs, {})["plain"], 1) == pytest.approx(seconds)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Return a function that runs the program with some words and returns its output."""
    places = ["--results", str(tmp_path / "results.jsonl"), "--image", str(tmp_path / "chart.png")]
    places += ["--costs", str(tmp_path / "costs.json"), "--folder", str(tmp_path)]

    def printed(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lag_study", *places, *words])
        assert main() == 0
        return capsys.readouterr().out

    return printed


def test_existing_results_are_listed_kept_and_plotted(tmp_path: Path, study: Callable[..., str]) -> None:
    runs = [result("large-lag1-plain", seed, 64, [-2.5] * 12) for seed in SEEDS]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    (tmp_path / "costs.json").write_text(json.dumps({"update over the plain one": {"plain": 1.0}}))
    lines = study("--list", "--only", "large-lag1-*").splitlines()
    assert {line.split()[1] for line in lines if line.startswith("done")} == {
        f"large-lag1-plain-seed{seed}-{IMAGES}images" for seed in SEEDS
    }
    assert len(lines) == 5 * len(SEEDS)  # the settings of large rounds at lag 1
    assert study("--run", "--only", "large-lag1-plain-*") == ""
    assert "| large-lag1-plain | -25.0, -30.0, -35.0 % |" in study("--chart")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_images_that_do_not_fill_rounds_are_refused(study: Callable[..., str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        study("--list", "--images", "100")
    assert "--images is 100: it must be a multiple of 64" in capsys.readouterr().err

"""The comparison with TRL: tables by hand, each side's input, and rounds of both sides in TRL's environment."""

from pathlib import Path

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load_file

from benchmarks import target_results
from benchmarks.against_trl import SAME, TRL, caption, one_round, read_rows, table, trl_job, words, write_rows
from benchmarks.embedded_model import RECIPE
from benchmarks.round_process import our_process, trl_process
from benchmarks.target import FAST, TRL_KEYS, Version, evaluate, trl_recipe, versions
from benchmarks.target_results import OURS, Point, draw_chart, first_past, read_points, write_points
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.train import run_training


def row(side: str, repeat: int, scale: float, **more: float) -> dict:
    times = {"sampling": 2 * scale, "scoring": 0.5, "learning": 5 * scale, "round": 8 * scale}
    facts = {"machine": "2 cores", "versions": "torch 2", "peak_bytes": 1e9 * scale}
    return {"side": side, "repeat": repeat, **times, **more, **facts}


def test_the_table_excludes_the_first_round_and_pairs_ratios_by_repeat(tmp_path: Path) -> None:
    ours = [
        row("a, b", repeat, scale, bare_sampling=1.0, bare_learning=4.0) for repeat, scale in enumerate((9, 1, 2, 1))
    ]
    rows = [*(row(TRL, repeat, scale) for repeat, scale in enumerate((7, 3, 4, 5))), *ours]
    write_rows(iter(rows), tmp_path / "rows.csv")
    again = read_rows(tmp_path / "rows.csv")
    assert again == rows and "bare_sampling" not in again[0]
    lines = table(again).splitlines()
    # Ratios are 3/1, 4/2 and 5/1; the bare loop's 1/2, 1/4, 1/2 and 4/5, 4/10, 4/5.
    assert lines[2] == "| TRL | 8.00 s | 20.00 s | 32.00 s | 1.00 | 1.00 | 1.00 | – | – | 56.0 s | 7,000 MB |"
    assert lines[3] == "| a, b | 2.00 s | 5.00 s | 8.00 s | 3.00 | 3.00 | 3.00 | 0.50 | 0.80 | 72.0 s | 9,000 MB |"
    assert len({line.count("|") for line in lines}) == 1
    assert "medians of 3 interleaved rounds" in caption(again)


def test_trl_gets_the_same_rounds() -> None:
    components = build_components(Recipe.load(RECIPE, [*words(SAME, {"rounds": "3"}), "--seed", "4"]))
    job = trl_job(components)
    config, sampling = job["config"], components.recipe.sampling
    assert Path(job["model"], "model_index.json").is_file() and len(job["prompts"]) == 45
    assert (config["sample_batch_size"], config["sample_num_batches_per_epoch"], config["sample_num_steps"]) == (
        8,
        4,
        20,
    )
    assert (config["train_batch_size"], config["train_learning_rate"], config["seed"]) == (8, 3e-4, 4)
    assert sampling.trained_steps(sampling.num_steps) == 20 and job["device"] == "cpu"  # TRL learns from all of them


def test_both_sides_train_one_model_on_equally_many_images_and_one_reward() -> None:
    ours, theirs = build_components(Recipe.load(FAST)), build_components(trl_recipe(0, []))
    assert ours.recipe.images_per_round == theirs.recipe.images_per_round == 64
    assert TRL_KEYS["rounds"] == str(theirs.recipe.rounds)
    assert ours.recipe.sampling.guidance_scale == theirs.recipe.sampling.guidance_scale
    assert (ours.policy, ours.rewards, ours.prompts.listed()) == (
        theirs.policy,
        theirs.rewards,
        theirs.prompts.listed(),
    )


CURVES = [
    *(Point(TRL, 0, round_index, 60.0 * round_index, -2.0 + 0.1 * round_index, 0.9) for round_index in range(4)),
    *(Point(OURS, 0, round_index, 30.0 * round_index, -2.0 + 0.16 * round_index, 0.8) for round_index in range(4)),
    *(Point(TRL, 1, round_index, 60.0 * round_index, (-2.0, -1.5, -1.6)[round_index], 0.9) for round_index in range(3)),
    *(Point(OURS, 1, round_index, 30.0 * round_index, -2.0, 0.8) for round_index in range(3)),
]


def test_the_target_is_trls_last_reward_and_the_first_version_past_it_counts(tmp_path: Path) -> None:
    write_points(reversed(CURVES), tmp_path / "points.csv", "2 cores")
    points, machine = read_points(tmp_path / "points.csv")
    assert machine == "2 cores" and sorted(map(str, points)) == sorted(map(str, CURVES))
    lines = target_results.table(points).splitlines()
    first = "3.00 min, round 3, named 0.90 | 1.00 min, round 2, named 0.80 | 3.00 |"
    assert lines[2] == f"| 0 | -2.000 | -1.700 (+15.0 %) | {first}"
    # TRL itself was there a round before its end, and that round is its time.
    assert lines[3] == "| 1 | -2.000 | -1.600 (+20.0 %) | 1.00 min, round 1, named 0.90 | not reached | – |"
    assert lines[-1] == "median: 3.00 ×"
    assert first_past([], -3.0) is None
    draw_chart(points, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


@pytest.fixture
def small(tables: dict, tmp_path: Path) -> str:
    """Return the path of the tiny recipe with an evaluation."""
    scorer = {"name": "animal_classifier", "measure": "top1"}
    tables = {**tables, "evaluation": {"images": 3, "scorers": [scorer]}, "checkpoint": {"every": 1, "keep": 9}}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    return str(tmp_path / "recipe.toml")


@pytest.mark.thorough
def test_our_side_runs_the_same_rounds_as_the_command(small: str, tmp_path: Path) -> None:
    with our_process(small, [], tmp_path, "ours") as process:
        assert set(process.answer()["versions"]) >= {"torch", "diffusers"}
        one_round(process, bare=True)
        last = process.ask(save=str(tmp_path / "weights.safetensors"))
    run_training(Recipe.load(small), serial=True)
    (*_, version) = our_versions(small, tmp_path)
    assert same_arrays(load_file(tmp_path / "weights.safetensors"), version.arrays())
    parts = ("sampling", "scoring", "learning")
    assert 0 < sum(last[part] for part in parts) <= last["round"] and last["peak_bytes"] > 1e8


def our_versions(small: str, folder: Path) -> list[Version]:
    (folder / "ours-seed0").symlink_to(Recipe.load(small).run_path())
    return versions(OURS, 0, folder)


def same_arrays(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parity
def test_both_sides_run_rounds_and_their_adapters_sample_images(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "trl-seed0"
    place.mkdir()
    job = trl_job(build_components(Recipe.load(small)))
    with trl_process(job, place) as process:
        assert process.answer()["versions"]["trl"] == "0.23.1"
        answers = [process.ask(save=str(place / f"{round_index:06d}.safetensors")) for round_index in (1, 2)]
    for answer in answers:
        parts = [answer[part] for part in ("sampling", "scoring", "learning")]
        assert min(parts) > 0 and sum(parts) <= answer["round"] and answer["reward"] < 0
    (place / "times.json").write_text("[1.5, 3.0]")
    run_training(Recipe.load(small), serial=True)
    our_versions(small, tmp_path)
    monkeypatch.setattr("benchmarks.target.RECIPE", small)
    points = list(evaluate([0], tmp_path, []))
    rewards = {(point.side, point.round): point.reward for point in points}
    assert rewards[TRL, 0] == rewards[OURS, 0] and rewards[TRL, 2] not in (rewards[TRL, 0], rewards[OURS, 2])
    assert next(point.seconds for point in points if (point.side, point.round) == (TRL, 2)) == 3.0


@pytest.mark.rotated(every=2, group="longest")
def test_a_side_that_dies_reports_its_error(small: str, tmp_path: Path) -> None:
    with (
        our_process(small, ["--rounds", "0"], tmp_path, "ours") as process,
        pytest.raises(RuntimeError, match="rounds"),
    ):
        process.answer()

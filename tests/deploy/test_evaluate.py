"""`ddpo evaluate`: any weights on the same held-out images, against the pretrained model or each other."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ray_ddpo import cli
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.png import from_png
from ray_ddpo.deploy.commands.evaluate import changes, in_words
from ray_ddpo.deploy.commands.weights.given_weights import load_policy
from ray_ddpo.deploy.driver.components import SCORING, build_components
from ray_ddpo.deploy.evaluation.eval_result import EvalResult, EvalScorer
from ray_ddpo.train import run_training

IMAGES = {"images": 6, "batch_size": 4}


def run_of(tables: dict, name: str, **changed: object) -> Path:
    learner = {**tables["learner"], "learning_rate": 0.1}  # so that sizes of files differ
    recipe = Recipe.parse({**tables, "name": name, "rounds": 1, "learner": learner, "evaluation": IMAGES, **changed})
    run_training(recipe, serial=True)
    return Path(recipe.run_path())


def figures_in(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.parametrize("trained", ["lora", pytest.param("full", marks=pytest.mark.thorough)])
def test_a_run_against_the_pretrained_model_gives_the_results_of_its_report(
    trained: str, tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tables["policy"] |= {"train": trained}
    run, output = run_of(tables, "one"), tmp_path / "found"
    assert cli.main(["report", str(run)]) == 0
    report = json.loads((run / "report/summary.json").read_text())
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--output", str(output)]) == 0
    figures = figures_in(output)
    assert figures["against"] == "pretrained" and list(figures["weights"]) == [str(run)]
    (found,) = figures["weights"][str(run)].values()
    assert found["images"] == 6 and found["before"] != found["after"]
    assert found["before"] == pytest.approx(report["reward_before"])
    assert found["after"] == pytest.approx(report["reward_after"])
    assert found["paired_standard_error"] == pytest.approx(report["paired_standard_error"])
    printed = capsys.readouterr().out
    assert "6 held-out images, same prompts and noise, against pretrained" in printed
    assert f"{found['before']:.4g} → {found['after']:.4g}" in printed
    rows = parquet.read_table(output / "images.parquet").to_pylist()
    assert [row["variant"] for row in rows] == ["pretrained"] * 6 + [str(run)] * 6
    assert [row["seed"] for row in rows[:6]] == [row["seed"] for row in rows[6:]]
    scores = [row["score/jpeg_compressibility"] for row in rows]
    assert np.mean(scores[:6]) == pytest.approx(found["before"])
    assert np.mean(scores[6:]) == pytest.approx(found["after"])
    assert not np.array_equal(from_png(rows[0]["pixels"]), from_png(rows[6]["pixels"]))
    assert len(np.unique(np.asarray(Image.open(output / "images.png")))) > 50


@pytest.mark.rotated(every=2, group="longest")
def test_two_runs_are_compared_with_each_other_and_a_lora_of_another_rank(tables: dict, tmp_path: Path) -> None:
    first, second = run_of(tables, "one"), run_of(tables, "two", seed=5)
    wide = run_of({**tables, "policy": {**tables["policy"], "lora": {"rank": 8, "alpha": 8}}}, "wide") / "lora"
    both, reverse = tmp_path / "both", tmp_path / "reverse"
    few = ["--evaluation.images", "4", "--evaluation.prompts", '["fox"]']
    assert cli.main(["evaluate", str(first), str(second), str(wide), "--output", str(both), *few]) == 0
    means = {name: scores["jpeg_compressibility"]["after"] for name, scores in figures_in(both)["weights"].items()}
    assert len(set(means.values())) == 3 and list(means) == [str(first), str(second), str(wide)]
    rows = parquet.read_table(both / "images.parquet").to_pylist()
    assert len(rows) == 16 and {row["prompt"] for row in rows} == {"fox"}
    arguments = [str(wide), "pretrained", "--against", str(second), "--recipe", str(first / "recipe.toml")]
    assert cli.main(["evaluate", *arguments, "--output", str(reverse), *few]) == 0
    figures = figures_in(reverse)
    assert figures["against"] == str(second)
    found = {name: scores["jpeg_compressibility"] for name, scores in figures["weights"].items()}
    assert {scores["before"] for scores in found.values()} == {means[str(second)]}
    assert found[str(wide)]["after"] == means[str(wide)]
    assert found["pretrained"]["change"] == pytest.approx(-_change(both, second))


def _change(folder: Path, run: Path) -> float:
    return figures_in(folder)["weights"][str(run)]["jpeg_compressibility"]["change"]


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("named", "says"),
    [
        (["{run}", "{run}"], "is named twice: weights are compared with others"),
        (["{run}", "--against", "{run}"], "is named twice"),
        (["{run}/lora"], "say with --recipe whose model these weights are for"),
        (["{run}", "{run}/nowhere"], "nowhere is no run with a LoRA, no folder with"),
        (["{run}", "--against", "{run}/nowhere"], "nowhere is no run with a LoRA, no folder with"),
        (["{run}", "{other}"], "have no layer of that name"),
        (["{other}", "{run}"], "have no layer of that name"),
        (["{run}", "--evaluation.image", "4"], "evaluation.image"),
    ],
)
def test_weights_that_cannot_be_compared_are_refused_before_sampling(
    named: list[str], says: str, tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    places = {"run": str(run_of(tables, "one")), "other": ""}
    if "{other}" in named:
        places["other"] = str(run_of(tables, "other") / "lora")
        _name_other_layers(Path(places["other"]))
    capsys.readouterr()
    arguments = [word.format(**places) for word in named]
    assert cli.main(["evaluate", *arguments, "--output", str(tmp_path / "found")]) == 2
    said = capsys.readouterr()
    assert says in said.err and "samples" not in said.err and not said.out
    assert not (tmp_path / "found").exists()


def _name_other_layers(lora: Path) -> None:
    """As a file for another model."""
    from safetensors.numpy import load_file, save_file

    (file,) = lora.glob("*.safetensors")
    save_file({name.replace("attentions.0", "attentions.7"): array for name, array in load_file(file).items()}, file)


def test_the_figures_of_a_comparison_by_hand(tables: dict) -> None:
    del tables["reward"]
    tables["rewards"] = [
        {"name": "jpeg_compressibility", "label": "small"},
        {"name": "jpeg_incompressibility", "label": "named", "weight": 2.0},
    ]
    recipe = Recipe.parse(tables)
    before, after = (
        EvalResult((Prompt("fox"),) * 4, (1, 2, 3, 4), scores, np.zeros((4, 8, 8, 3), np.uint8))
        for scores in (
            {
                "reward": np.array([3.0, 4.0, np.nan, 2.0]),
                "small": np.full(4, np.nan),
                "named": np.array([1.0, 1.0, 0.0, 1.0]),
            },
            {
                "reward": np.array([4.0, 4.0, 9.0, 5.0]),
                "small": np.array([1.0, np.nan, np.nan, np.nan]),
                "named": np.array([1.0, 0.0, 1.0, np.nan]),
            },
        )
    )
    found = changes(recipe, before, after)
    # Differences 1, 0, 3 of the three that have both: mean 4/3, deviation √(7/3), over √3.
    error = (7 / 3) ** 0.5 / 3**0.5
    assert found["reward"] == pytest.approx(
        {"images": 3, "before": 3.0, "after": 13 / 3, "change": 4 / 3, "paired_standard_error": error}
    )
    assert found["small"] is None
    assert found["named"] is not None and found["named"]["kept"] == 0.5 and found["named"]["images"] == 3
    lines = in_words("runs/one", found).splitlines()
    assert lines[0] == "runs/one"
    assert lines[1] == "  reward  3 → 4.333, +44.4 %, +1.5 paired standard errors"
    assert lines[2] == "  small   fewer than two images could be scored both times"
    assert lines[3].endswith("of those with 1 before 50 % still have it")


def test_a_prompt_that_is_truncated_is_named_once(tables: dict, capsys: pytest.CaptureFixture) -> None:
    long = "a cat " * 60
    recipe = Recipe.parse({**tables, "evaluation": {"images": 2, "prompts": [long, "a dog"]}})
    components = build_components(recipe, used=SCORING)
    scorer, policy = EvalScorer(components), load_policy(recipe, None)
    for label in ("pretrained", "trained"):
        scorer.evaluate(policy, label)
    assert capsys.readouterr().err.count("1 of 2 are longer than a text encoder reads") == 1

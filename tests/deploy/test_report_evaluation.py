"""Evaluations and the guard in the report, in `ddpo sample` and in `ddpo push`."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_ddpo import cli
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report.evaluation import CategoryRow, evaluation_section, guard_sentences
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.eval_result import EvalResult
from ray_ddpo.train import run_training


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    tables = {
        "name": "told",
        "rounds": 4,
        "sampling": {},
        "output_dir": str(tmp_path_factory.mktemp("runs")),
        "policy": {"name": "stable_diffusion", "model": "tiny_animals"},
        "prompts": {"name": "animals"},
        "reward": {"name": "brightness"},
        "algorithm": {"name": "ddpo_is", "clip_range": 1e-3},
        "learner": {"batch_size": 4, "micro_batch_size": 8},
        "evaluation": {"every": 2, "scorers": [{"name": "entropy"}]},
    }
    return Recipe.parse(tables)


def found(version: int, brightness: float, entropy: float, sharpness: float, *alarms: str) -> dict:
    """A line of evaluations.jsonl as far as the page reads it."""
    scores = {"brightness": brightness, "reward": brightness, "entropy": entropy}
    return {
        "policy_version": version,
        "scores": {name: {"mean": mean, "standard_error": 0.5} for name, mean in scores.items()},
        "image_statistics": {"dark_share": 0.25, "sharpness": sharpness, "entropy": entropy, "diversity": 2.0},
        "kl_reference_nats": version or None,
        "alarms": [{"about": "entropy", "says": says} for says in alarms],
    }


def written(recipe: Recipe, *figures: dict) -> RunFolder:
    folder = RunFolder(recipe.run_path())
    folder.create()
    log = EvalLog(folder.storage)
    log.keep([])
    for each in figures:
        log.write(each, {"current": images_of(each)}, num_pixels=2)
    return folder


def images_of(figures: dict) -> EvalResult:
    """Three grey images, as grey as the version's number."""
    pixels = np.full((3, 8, 8, 3), figures["policy_version"], np.uint8)
    return EvalResult((Prompt("cat"),) * 3, (1, 2, 3), {"brightness": np.ones(3)}, pixels)


def test_curves_over_the_versions_by_hand(recipe: Recipe) -> None:
    folder = written(recipe, found(4, 20, 4, 5, "it fell"), found(0, 10, 8, 20), found(2, 15, 6, 10))
    told = evaluation_section(folder, recipe)
    charts = {chart.title: chart for chart in told.charts}
    # One reward is its own sum, so `reward` would be the same curve again; nothing was averaged.
    assert list(charts) == ["brightness", "entropy", "what is left", "dark share", "KL to the pretrained model"]
    assert charts["brightness"].in_words == "newest version: 10.00 in the first version, 20.00 in the last"
    assert charts["brightness"].curves[0].band and charts["entropy"].caption.startswith("not trained on")
    assert "not trained on" not in charts["brightness"].caption
    assert charts["what is left"].in_words.startswith("sharpness: 1.000 in the first version, 0.2500 in the last")
    assert [text for _, text in charts["brightness"].x_ticks] == ["0", "1", "2", "3", "4"]
    assert told.alarms == [(4, "entropy", "it fell")] and told.sentences == []
    assert [(row.policy_version, row.alarm) for row in told.rows] == [(0, False), (2, False), (4, True)]
    assert guard_sentences(folder) == []  # the last line is version 2's


def test_the_best_version_of_each_category_is_named(recipe: Recipe) -> None:
    versions = [found(version, 10, 8, 20) for version in (0, 2, 4)]
    for each, counting, colors in zip(versions, (0.25, 0.75, 0.5), (0.5, 0.5, None), strict=True):
        each["scores"]["entropy"] |= {"category/counting": counting, "category/colors": colors}
    assert evaluation_section(written(recipe, *versions), recipe).categories == [
        CategoryRow("entropy", "counting", 0.25, 0.75, 2, 0.5),
        CategoryRow("entropy", "colors", 0.5, 0.5, 0, pytest.approx(float("nan"), nan_ok=True)),
    ]


def test_one_version_alone_is_no_curve_and_a_calm_guard_says_so(recipe: Recipe) -> None:
    assert evaluation_section(written(recipe, found(0, 10, 8, 20)), recipe).charts == []
    told = evaluation_section(written(recipe, found(0, 10, 8, 20), found(2, 9, 8, 20)), recipe)
    assert told.sentences == ["The guard has found nothing."]


def test_a_few_of_many_versions_are_shown_with_their_saved_images(recipe: Recipe) -> None:
    folder = written(recipe, *(found(version, 10, 8, 20) for version in range(0, 40, 2)))
    rows = evaluation_section(folder, recipe).rows
    assert [row.policy_version for row in rows] == [0, 6, 10, 16, 22, 28, 32, 38]
    data = base64.b64decode(rows[1].images[0].partition(",")[2])
    assert np.asarray(Image.open(io.BytesIO(data))).tolist() == np.full((8, 8, 3), 6).tolist()
    assert (len(rows[1].images), rows[1].width) == (2, 8)


def test_an_alarm_at_the_last_version_stands_in_the_summary(recipe: Recipe) -> None:
    folder = written(recipe, found(0, 10, 8, 20), found(2, 9, 8, 20, "this", "that"))
    assert guard_sentences(folder) == ["At the last version the guard has found: this; that."]


@pytest.mark.thorough
def test_a_run_that_was_rolled_back_is_compared_by_the_weights_that_it_has(
    tables: dict, capsys: pytest.CaptureFixture
) -> None:
    evaluation = {"every": 2, "prompts": ["cat", "dog"], "images": 6, "batch_size": 4}
    guard = {"max_kl_nats": 1e-9, "on_alarm": "roll_back"}
    recipe = Recipe.parse({**tables, "rounds": 5, "evaluation": evaluation, "guard": guard})
    run_training(recipe, serial=True)
    run = Path(recipe.run_path())
    assert cli.main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "ended by the guard" in said and "guard" in said and "version 2: the policy is" in said
    assert cli.main(["report", str(run)]) == 0
    summary = json.loads((run / "report" / "summary.json").read_text())
    best = json.loads((run / "best" / "best.json").read_text())
    assert (summary["policy_version"], summary["fingerprint"]) == (0, best["fingerprint"])
    assert summary["reward_after"] == pytest.approx(summary["reward_before"])  # version 0 is the pretrained model
    page = (run / "report" / "report.html").read_text()
    assert "The guard has ended the run at version 2: the policy is" in page
    assert "The run&#39;s weights are those of version 0." in page and "During training" in page
    assert (run / "report" / "versions.png").stat().st_size > 1000

"""`ddpo evaluate --suite`: means by category, intervals over prompts, several weights, JSON and HTML."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from ray_ddpo import cli
from ray_ddpo.common.prompt_set import shipped_prompts
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RewardTable
from ray_ddpo.common.run_storage.png import from_png
from ray_ddpo.common.suite_prompts import suite_source
from ray_ddpo.common.suites import SUITES, Suite
from ray_ddpo.deploy.commands.suite.page import shown_uri
from ray_ddpo.deploy.driver.components import build_reward
from ray_ddpo.deploy.evaluation.categories import Z95, CategoryMean, best_of, category_means
from ray_ddpo.train import run_training
from tests.tiny_clips import moving_clip

SCORES = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, np.nan, 1.0])
CATEGORIES = ["one", "one", "one", "one", "two", "two", "two", "two"]
PROMPTS = ["a", "a", "b", "b", "c", "c", "d", "d"]


def test_a_prompts_images_are_averaged_before_the_standard_error() -> None:
    total, of_category = category_means(CATEGORIES, PROMPTS, SCORES, mean_of_categories=False)
    one, two = of_category["one"], of_category["two"]  # prompts' means 0.5 and 1; 0 and 1
    assert (one.prompts, one.images, one.mean) == (2, 4, 0.75) and one.standard_error == pytest.approx(0.25)
    assert (two.prompts, two.images, two.mean) == (2, 3, 0.5) and two.standard_error == pytest.approx(0.5)
    assert (total.prompts, total.images) == (4, 7) and total.mean == pytest.approx(0.625)
    assert one.interval == pytest.approx((0.75 - Z95 / 4, 0.75 + Z95 / 4))


def test_the_suites_mean_is_that_of_its_categories_if_it_says_so() -> None:
    """GenEval's summary_scores.py: the mean over tasks, however many prompts each has."""
    rows = [0, 1, 2, 3, 4, 5, 7]  # without the image that has no score
    total, _ = category_means(["one"] * 6 + ["two"], PROMPTS[:7], np.array([0.0] * 6 + [1.0]), True)
    assert total.mean == 0.5 and total.standard_error is None  # one image of the second category
    scores = np.array([0.0] * 6 + [1.0, 0.0])
    total, of_category = category_means(["one"] * 6 + ["two"] * 2, PROMPTS, scores, True)
    # One prompt of the second category, whose images are 1 and 0: deviation √½, over √2.
    assert of_category["two"].standard_error is None and total.standard_error == pytest.approx(0.5 / 2)
    total, _ = category_means([CATEGORIES[row] for row in rows], [PROMPTS[row] for row in rows], SCORES[rows], True)
    assert total.mean == pytest.approx((0.75 + 0.5) / 2)
    assert total.standard_error == pytest.approx(np.sqrt(0.25**2 + 0.5**2) / 2)


def test_intervals_hold_the_true_mean_in_19_of_20_suites() -> None:
    generator, inside = np.random.default_rng(0), 0
    for _ in range(400):
        chances = generator.uniform(0, 1, 60)  # of each prompt, so that its four images are alike
        scores = (generator.random((60, 4)) < chances[:, None]).astype(float).ravel()
        total, _ = category_means(["x"] * 240, [str(row // 4) for row in range(240)], scores, False)
        low, high = total.interval or (1.0, 0.0)
        inside += low <= 0.5 <= high
    assert 0.92 * 400 < inside < 0.98 * 400, inside


def test_the_best_weights_of_each_category_are_named() -> None:
    mean = lambda value: CategoryMean(1, 1, value, None)  # noqa: E731
    rows = {"a": {"x": mean(0.1), "y": mean(0.9)}, "b": {"x": mean(0.2), "y": mean(0.3)}, "c": {"y": mean(0.9)}}
    assert best_of(rows) == {"x": "b", "y": "a"}
    assert best_of({"a": rows["a"], "b": rows["a"]}) == {}


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_names_scorers_that_exist(name: str) -> None:
    tables = [RewardTable.model_validate(table) for table in SUITES[name].scorers]
    assert len({table.called for table in tables}) == len(tables)
    for table in tables:
        build_reward(table)
    assert (SUITES[name].published is None) != (SUITES[name].shipped is None)


def check_means(rows: list[dict], found: dict) -> None:
    """Check the means of brightness by category against the rows of images."""
    by_tag = {
        tag: np.mean([row["score/brightness"] for row in rows if json.loads(row["metadata"])["tag"] == tag])
        for tag in ("colors", "counting")
    }
    assert {name: found[name]["mean"] for name in by_tag} == pytest.approx(by_tag)
    assert found["suite"]["mean"] == pytest.approx(np.mean(list(by_tag.values())))
    assert found["colors"]["interval_95"][0] <= found["colors"]["mean"] <= found["colors"]["interval_95"][1]


@pytest.mark.rotated(every=2, group="longest")
def test_a_suite_compares_weights_by_category(
    small_suite: Suite, tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = Recipe.parse({**tables, "rounds": 1, "learner": {**tables["learner"], "learning_rate": 0.1}})
    run_training(recipe, serial=True)
    run, output = recipe.run_path(), tmp_path / "found"
    words = ["evaluate", run, "--suite", "geneval", "--prompts-from", str(tmp_path / "prompts")]
    assert cli.main([*words, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    told = json.loads((output / "suite.json").read_text())
    assert (told["suite"], told["prompts"], told["images_per_prompt"], told["settings"]["images"]) == (
        "geneval",
        6,
        2,
        12,
    )
    assert list(told["scores"]) == ["geneval", "brightness"]
    rows = parquet.read_table(output / "images.parquet").to_pylist()
    assert [row["variant"] for row in rows] == ["pretrained"] * 12 + [run] * 12
    for location in ("pretrained", run):
        found = told["scores"]["brightness"]["weights"][location]
        check_means([row for row in rows if row["variant"] == location], found)
        assert f"{found['suite']['mean']:.4g}" in printed
    change = told["scores"]["brightness"]["change"][run]["suite"]
    means = {location: each["suite"]["mean"] for location, each in told["scores"]["brightness"]["weights"].items()}
    assert change["mean"] == pytest.approx(means[run] - means["pretrained"]) and change["mean"] != 0
    best = max(means, key=means.__getitem__)
    assert told["scores"]["brightness"]["best"]["suite"] == best
    page = (output / "suite.html").read_text()
    assert page.count("<img") == 2 * 6 and not re.search(r"(src|href)=\"https?:", page)
    assert cli.main([*words, "--output", str(output)]) == 2
    assert "has the result of an earlier evaluation" in capsys.readouterr().err
    # The small model draws no shapes: where all weights are equal, none is the best.
    alike = ["--scorers", '[{ name = "geneval", detector = "shapes", measure = "strict" }]']
    assert cli.main([*words, *alike, "--output", str(tmp_path / "alike")]) == 0
    assert json.loads((tmp_path / "alike" / "suite.json").read_text())["scores"]["geneval"]["best"] == {}
    page = (tmp_path / "alike" / "suite.html").read_text()
    assert 'class="number best"' not in page and page.count("change") >= 3
    only = [
        "--scorers",
        '[{ name = "entropy" }]',
        "--recipe",
        f"{run}/recipe.toml",
        "--output",
        str(tmp_path / "other"),
    ]
    assert cli.main(["evaluate", "pretrained", *words[2:], *only]) == 0
    other = json.loads((tmp_path / "other" / "suite.json").read_text())
    assert list(other["scores"]) == ["entropy"] and list(other["scores"]["entropy"]["weights"]) == ["pretrained"]
    assert other["prompts_sha256"] == told["prompts_sha256"] and other["settings"]["seeds"] == told["settings"]["seeds"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "genevall"], "--suite is 'genevall': it must be one of"),
        (
            ["--suite", "ocr"],
            "the suite ocr needs prompts/ocr_test.jsonl, which is not there: fetch it with ddpo prompts",
        ),
        (["--suite", "words", "--scorers", "[{"], "which is no list of tables in TOML"),
        (["--suite", "words", "--scorers", "3"], "it must be a list of tables"),
        (
            ["--suite", "words", "--scorers", '[{ name = "ocr" }, { name = "ocr", measure = "strict" }]'],
            "--scorers are called ['ocr', 'ocr']: give a label to those of one name",
        ),
        (["--scorers", "[]"], "--scorers is for a suite"),
        (["--suite", "words"], "the pretrained model alone needs --recipe"),
        (["--suite", "words", "--evaluation.images", "4"], "--evaluation.images has no effect on a suite"),
        (["--suite", "words", "--reward.measure=strict"], "--reward.measure has no effect on a suite"),
    ],
)
def test_what_cannot_be_run_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "pretrained", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_shipped_suites_use_the_test_prompts() -> None:
    for name in ("words", "shapes"):
        found = suite_source(SUITES[name], Path("nowhere"), "--prompts-from").evaluated()
        assert found == shipped_prompts(name, "test")


def test_a_clips_poster_has_the_size_of_its_file() -> None:
    for pixels, size in ((moving_clip(), (80, 120, 3)), (moving_clip()[0], (16, 24, 3))):
        assert from_png(base64.b64decode(shown_uri(pixels).partition(",")[2])).shape == size

"""The page of `ddpo report`: no requests, no markup from a run, and numbers by hand."""

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ray_ddpo.actors.evaluation.eval_set import EvalSet
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report.image_pairs import EDGE, data_uri, gallery, worst_and_best
from ray_ddpo.deploy.commands.report.numbers import number, signed
from ray_ddpo.deploy.commands.report.page import HERE, FinishedRun, report_page, summary_in_words, versions
from ray_ddpo.deploy.commands.report.report import in_words, logged_rounds
from ray_ddpo.deploy.commands.report.scores import PromptRow, headline, held_out_table, paired, scores, training_table
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.deploy.evaluation.eval_result import EvalComparison
from tests.logged_rounds import logged

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "</style></pre>&amp;'")


LINKS = ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background")


class Markup(HTMLParser):
    """A page's elements with their attributes, and its text by the element that it stands in."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open, data))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def compared(
    before: dict[str, Any], after: dict[str, Any], prompts: tuple[str, ...] = (), size: int = 8
) -> EvalComparison:
    """PageImages of noise with these scores; without a score `reward`, the first one's."""
    first = next(iter(before))
    found = [{name: np.array(values, np.float32) for name, values in scored.items()} for scored in (before, after)]
    for scored in found:
        scored.setdefault("reward", scored[first])
    images = len(found[0]["reward"])
    pixels = np.random.default_rng(0).integers(0, 256, (2, images, size, size, 3), np.uint8)
    texts = [prompts[image % len(prompts)] if prompts else f"prompt {image}" for image in range(images)]
    chosen = EvalSet(tuple(map(Prompt, texts)), tuple(range(images)), 4)
    return EvalComparison(chosen, pixels[0], pixels[1], *found)


def run_of(recipe: Recipe, rounds: int = 3) -> FinishedRun:
    folder = RunFolder(recipe.run_path())
    folder.write_recipe(build_components(recipe).resolved())
    return FinishedRun(
        folder, recipe, [], [logged(round_index) for round_index in range(rounds)], "0123456789abcdef", rounds
    )


def keep_rows(folder: RunFolder, round_index: int, rows: list[tuple[str, float | None, str | None]]) -> None:
    """A round of a ledger, of prompt, reward and why it was dropped."""
    prompts, rewards, reasons = zip(*rows, strict=True)
    values = pa.array(rewards, pa.float64())
    columns = {"prompt": list(prompts), "reward": values, "reward/jpeg_compressibility": values}
    buffer = io.BytesIO()
    parquet.write_table(pa.table({**columns, "dropped": pa.array(reasons, pa.string())}), buffer)
    folder.storage.write(f"rollouts/round={round_index:06d}/images.parquet", buffer.getvalue())


@pytest.fixture
def scored() -> EvalComparison:
    return compared({"jpeg_compressibility": [-3, -2, -3, -2]}, {"jpeg_compressibility": [-2, -2, -1, -1]}, HOSTILE)


def test_nothing_that_a_run_brings_becomes_markup(tables: dict, scored: EvalComparison) -> None:
    tables["prompts"] = {"name": "texts", "texts": HOSTILE}
    run = run_of(Recipe.parse(tables))
    for round_index in range(2):
        keep_rows(run.folder, round_index, [(prompt, 1.0, None) for prompt in HOSTILE])
    page = Markup(report_page(run, scored))
    assert page.of("script") == [(HERE / "page.js").read_text()]
    assert (page.count("script"), page.count("style"), page.count("pre")) == (1, 1, 1)
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    cells = [text for text in page.of("td") if text in HOSTILE]
    assert sorted(cells) == sorted(2 * HOSTILE)  # among the held-out images, and among those learned from
    assert {f"before: {prompt}" for prompt in HOSTILE} <= {attributes.get("alt") for _, attributes in page.elements}


def test_the_page_asks_for_nothing_outside_itself(recipe: Recipe, scored: EvalComparison) -> None:
    page = report_page(run_of(recipe), scored)
    links = [
        (name, value) for _, attributes in Markup(page).elements for name, value in attributes.items() if name in LINKS
    ]
    assert len([value for name, value in links if name == "src"]) == 2 * 4 + 2 * 4  # gallery; two lowest, two highest
    assert [value for _, value in links if not (value or "").startswith(("data:image/", "#"))] == []
    for reference in ("http:", "https:", 'src="//', "url(", "@import", "<link", "<iframe", "fetch("):
        assert reference not in page
    assert "default-src 'none'; img-src data:; " in page


def test_a_part_of_the_images_is_said_to_be_one(recipe: Recipe) -> None:
    of_forty = compared({"jpeg_compressibility": np.arange(40)}, {"jpeg_compressibility": np.arange(40) % 7})
    page = report_page(run_of(recipe), of_forty)
    assert "The first 36 of 40 held-out images" in page
    assert Markup(page).count("img") == 2 * (36 + 6 + 6)
    of_four = compared({"jpeg_compressibility": [1, 2, 3, 4]}, {"jpeg_compressibility": [2, 3, 4, 6]})
    assert "All 4 held-out images" in report_page(run_of(recipe), of_four)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_without_rows_or_with_one_round_has_a_page(recipe: Recipe, scored: EvalComparison, rounds: int) -> None:
    page = Markup(report_page(run_of(recipe, rounds), scored))
    assert page.count("table") == 2  # the scores, and the held-out images by prompt
    assert any("a run keeps with rollouts.keep" in text for text in page.of("p"))
    assert any(f"in {'one round' if rounds == 1 else '2 rounds'} and" in text for text in page.of("p"))


def test_versions_and_overrides_are_reported(recipe: Recipe, scored: EvalComparison) -> None:
    run = run_of(recipe)
    text = run.folder.storage.read("recipe.toml").decode()
    assert dict(versions(text))["torch"] in text.splitlines()[1] and len(versions(text)) == 7
    page = Markup(report_page(FinishedRun(**{**vars(run), "overrides": ["--evaluation.images", "4"]}), scored))
    assert "--evaluation.images 4" in page.of("code") and page.of("pre") == [text]


def test_each_prompt_of_the_held_out_images_by_hand() -> None:
    comparison = compared({"a": [1, 2, 3, 5]}, {"a": [2, 2, math.nan, 4]}, prompts=("cat", "dog"))
    table = held_out_table(comparison, "a")
    # cat: 1 and 3 before, 2 and none after; dog: 2 and 5, then 2 and 4.
    assert table.rows == [PromptRow("dog", 2, 3.5, 3.0), PromptRow("cat", 2, 2.0, 2.0)]


def test_each_prompt_learned_from_by_hand(recipe: Recipe) -> None:
    run = run_of(recipe)
    keep_rows(run.folder, 0, [("cat", 1.0, None), ("cat", 2.0, None), ("fox", 5.0, None), ("ant", 9.0, "its group's")])
    for round_index in range(1, 7):
        keep_rows(run.folder, round_index, [("owl", 100.0, None)])
    keep_rows(run.folder, 7, [("cat", 4.0, None), ("bee", 1.0, None), ("cat", None, "it gave nan")])
    table = training_table(Ledger(run.folder.storage, recipe.rollouts), "reward")
    assert table is not None and (table.before, table.after) == ("rounds 0–1", "rounds 6–7")
    found = {row.prompt: (row.images, row.before, row.after) for row in table.rows}
    assert found["cat"] == (3, 1.5, 4.0) and found["owl"] == (2, 100.0, 100.0)
    assert found["fox"][:2] == (1, 5.0) and math.isnan(found["fox"][2]) and "ant" not in found
    assert [row.prompt for row in table.rows][:2] == ["cat", "owl"]  # the largest change first, those without one last
    assert training_table(Ledger(run.folder.storage, recipe.rollouts), "brightness") is None  # of --reward alone


def several(tables: dict, **second: Any) -> Recipe:
    del tables["reward"]
    rewards = [
        {"name": "jpeg_compressibility", "label": "small", "weight": 2.0},
        {"name": "jpeg_incompressibility", "label": "rich", "weight": 0.5, "floor": 2.0, **second},
    ]
    return Recipe.parse({**tables, "rewards": rewards, "evaluation": {"scorers": [{"name": "animal_classifier"}]}})


def test_every_reward_and_scorer_by_hand(tables: dict) -> None:
    before = {"small": [1, 2, 3], "rich": [1, 1, 4], "animal_classifier": [1, 1, 0], "reward": [2.5, 4.5, 8]}
    after = {"small": [2, 2, 6], "rich": [1, 3, 4], "animal_classifier": [1, 0, 0], "reward": [4.5, 5.5, 14]}
    recipe = several(tables)
    joined, small, rich, animals = scores(compared(before, after), recipe)
    assert [row.name for row in (joined, small, rich, animals)] == ["reward", "small", "rich", "animal_classifier"]
    # Of small: differences 1, 0, 3, with deviation √(7/3), over √3.
    assert (small.before, small.after, small.higher, small.lower) == (2.0, pytest.approx(10 / 3), 2, 0)
    assert small.error == pytest.approx((7 / 9) ** 0.5) and small.errors == pytest.approx(4 / 3 / (7 / 9) ** 0.5)
    assert (rich.below_before, rich.below_after) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert rich.role == "trained on, weight 0.5, floor 2" and not animals.trained_on and animals.kept == 0.5
    page = Markup(report_page(run_of(recipe), compared(before, after)))
    assert {"reward", "small", "rich", "animal_classifier"} <= set(page.of("b"))


def test_without_any_weight_the_page_is_about_the_first_reward(tables: dict) -> None:
    recipe = several(tables, weight=0)
    assert headline(recipe) == "reward"
    floors = Recipe.parse({**tables, "rewards": [{"name": "jpeg_compressibility", "weight": 0, "floor": -1.0}]})
    assert headline(floors) == "jpeg_compressibility"


def test_images_that_could_not_be_scored_both_times_are_left_out() -> None:
    comparison = compared({"a": [1, math.nan, 3, 4]}, {"a": [2, 2, math.inf, 6]})
    before, after = paired(comparison, "a")
    assert (before.tolist(), after.tolist()) == ([1, 4], [2, 6])
    with pytest.raises(ValueError, match="a gave a finite number for 1 of 2"):
        paired(compared({"a": [1, math.nan]}, {"a": [1, 1]}), "a")


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([2.0, 3.1, 3.9, 5.1], "rose from 2.500 to 3.525 (+41.0"),
        ([2.0, 3.1, 3.9, 5.1], "more than chance"),
        ([0.0, 1.1, 1.9, 3.1], "fell from 2.500 to 1.525"),
        ([2.0, 1.0, 3.5, 4.0], "which cannot be told from chance"),
        ([1.0, 2.0, 3.0, 4.0], "stayed at 2.500: no image changed"),
        ([2.0, 3.0, 4.0, 5.0], "every image changed alike"),
    ],
)
def test_the_verdict_says_how_sure_it_is(recipe: Recipe, after: list[float], said: str) -> None:
    before = {"jpeg_compressibility": [1.0, 2.0, 3.0, 4.0]}
    found = scores(compared(before, {"jpeg_compressibility": after}), recipe)
    assert said in summary_in_words(found, [logged(0)])[0]


@pytest.mark.parametrize("hacked", [True, False])
def test_a_scorer_that_falls_while_the_reward_rises_is_pointed_out(tables: dict, hacked: bool) -> None:
    tables["evaluation"] = {"scorers": [{"name": "animal_classifier"}]}
    before = {"jpeg_compressibility": [1, 2, 3, 4], "animal_classifier": [0.9, 0.8, 0.9, 0.8]}
    probe = [0.1, 0.2, 0.1, 0.3] if hacked else [0.9, 0.9, 0.9, 0.8]
    after = {"jpeg_compressibility": [2, 3.1, 3.9, 5], "animal_classifier": probe}
    sentences = summary_in_words(scores(compared(before, after), Recipe.parse(tables)), [logged(0)])
    assert any("may be reward hacking" in sentence for sentence in sentences) == hacked


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_small_image_is_kept_exactly_and_a_large_one_made_smaller() -> None:
    small = np.random.default_rng(0).integers(0, 256, (64, 32, 3), np.uint8)
    assert np.array_equal(np.asarray(opened(data_uri(small))), small)
    large = data_uri(np.full((1024, 512, 3), 90, np.uint8))
    assert large.startswith("data:image/webp;base64,") and opened(large).size == (EDGE // 2, EDGE)


def test_worst_and_best_are_the_extremes_and_never_one_twice() -> None:
    comparison = compared({"a": [0] * 7}, {"a": [3, math.nan, 1, 9, 5, 7, 2]})
    worst, best = worst_and_best(comparison, "a")
    assert [pair.reward_after for pair in worst] == [1, 2, 3] and [pair.reward_after for pair in best] == [9, 7, 5]
    assert [pair.prompt for pair in gallery(comparison, "a")] == [f"prompt {image}" for image in range(7)]


def test_numbers_as_people_read_them() -> None:
    shown = [number(value) for value in (-2.6, 0.0, 12345.6, 1e-7, math.nan, None)]
    assert shown == ["−2.600", "0", "12,346", "1.000e−07", "–", "–"]
    assert [signed(value) for value in (1, -0.5, 123456)] == ["+1.00", "−0.500", "+123,456"]


def test_metrics_are_read_without_what_a_kill_cut_off(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"round": 0.0, "seconds/round": 1.0, "idle/sampler": null}\n{"round": 1.0, "idle/samp'
    )
    rounds = logged_rounds(RunFolder(tmp_path))
    assert len(rounds) == 1 and math.isnan(rounds[0]["idle/sampler"])


def test_a_reward_that_was_0_has_no_change_in_percent(tmp_path: Path) -> None:
    figures = {"reward_before": 0.0, "reward_after": 0.5, "paired_standard_error": 0.1, "images_compared": 4}
    said = in_words({**figures, "scorers": {}, "policy_version": 1, "fingerprint": "0" * 64}, RunFolder(tmp_path))
    assert "0.000 before, 0.500 after (+5.0 paired standard errors)" in said
    assert json.dumps(str(tmp_path)).strip('"') + "/report/report.html" in said

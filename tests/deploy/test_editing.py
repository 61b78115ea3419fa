"""A run that edits input images: its ledger, files, evaluation, sample and report; recipes without images are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_ddpo import cli, train
from ray_ddpo.common.input_images import read_inputs
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.model_card.card import loading
from ray_ddpo.deploy.commands.report.scores import training_table
from ray_ddpo.deploy.driver.components import build_components, components_of
from ray_ddpo.deploy.evaluation.categories import category, means_by_category
from ray_ddpo.handed_over import stored_rows
from ray_ddpo.train import run_training
from tests.accepted_page import assert_refused
from tests.input_files import input_mask, input_pixels, input_table, save_inputs
from tests.tiny_families import MAKERS, policy_table


def edit_tables(tables: dict, folder: Path, family: str = "flux_kontext") -> dict:
    """Return a small recipe of an editing family, with its model and its prompts."""
    model = folder / family
    if not model.exists():
        MAKERS[family](model)
    return {
        **tables,
        "policy": policy_table(family, model),
        "prompts": input_table(save_inputs(folder / "inputs"), mask=True) | {"images_per_prompt": 2},
        "sampling": {**tables["sampling"], "eta": 0.7},
        "reward": {"name": "edit_preservation"},
        "algorithm": {"name": "grpo"},
        "learner": {**tables["learner"], "micro_batch_size": 4},
        "evaluation": {"every": 1, "images": 4, "batch_size": 4},
        "checkpoint": {"every": 1, "keep": 3},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import small_tables

    folder = tmp_path_factory.mktemp("editing")
    recipe = Recipe.parse(edit_tables(small_tables(folder, folder), folder))
    run_training(recipe, serial=True)
    return Path(recipe.run_path())


def test_a_run_edits_its_input_images_and_the_ledger_knows_them(run: Path) -> None:
    recipe = Recipe.load(str(run / "recipe.toml"))
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rounds[0]["ratio/max_abs_log"] <= 1e-5 and rounds[1]["kl_nats"] != 0
    rows = Ledger(RunFolder(str(run)).storage, recipe.rollouts).read(0).to_pylist()
    about = [json.loads(row["metadata"]) for row in rows]
    assert all(len(each["image_sha256"]) == len(each["mask_sha256"]) == 64 for each in about)
    assert [each["image"] for each in about[::2]] == [each["image"] for each in about[1::2]]  # groups of two
    assert all(0 < row["reward"] < 1 for row in rows)
    # One text with two input images is two prompts, in statistics too.
    named = {name for entry in rounds for name in entry if name.startswith("reward/prompt/make it red")}
    assert all(name.startswith("reward/prompt/make it red [") for name in named)
    base = json.loads((run / "base.json").read_text())
    assert "8 input images" in base["prompts.image_column"]["path"]


def test_a_round_is_sampled_again_with_the_same_bits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(run), "--round", "1"]) == 0
    assert "all 8 images are equal" in capsys.readouterr().out


def test_sample_takes_the_file_that_each_prompt_edits(run: Path, tmp_path: Path) -> None:
    inputs = run.parents[1] / "inputs"

    def sampled(image: str, output: str) -> np.ndarray:
        asked = ["sample", "--lora", str(run), "--image", image, "--output", str(tmp_path / output), "a cat"]
        assert cli.main(asked) == 0
        return np.asarray(Image.open(tmp_path / output / "000-a_cat-seed0.png"))

    first, again, other = (
        sampled(str(inputs / name), name[0] + str(n)) for n, name in enumerate(("0.png",) * 2 + ("1.png",))
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_sample_refuses_other_images_than_the_family_reads(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", "--lora", str(run), "a cat"]) == 2
    assert "FluxKontextPolicy takes --image, and was given none of them" in capsys.readouterr().err
    assert cli.main(["sample", "--lora", str(run), "--image", "/no/such.png", "a cat"]) == 2
    assert "there is no image '/no/such.png'" in capsys.readouterr().err
    inputs = run.parents[1] / "inputs"
    both = ["--image", str(inputs / "0.png"), "--mask", str(inputs / "0_mask.png")]
    assert cli.main(["sample", "--lora", str(run), *both, "a cat"]) == 2
    assert "takes --image, and was given --image --mask" in capsys.readouterr().err
    Image.new("I;16", (16, 16), 1000).save(tmp_path / "deep.png")
    assert cli.main(["sample", "--lora", str(run), "--image", str(tmp_path / "deep.png"), "a cat"]) == 2
    assert "ddpo sample: --image: the image" in capsys.readouterr().err


def test_evaluate_and_report_show_the_input_images(run: Path, tmp_path: Path) -> None:
    assert cli.main(["evaluate", str(run), "--output", str(tmp_path / "evaluation")]) == 0
    change = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["weights"][str(run)]
    assert 0 < change["edit_preservation"]["before"] < 1
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report" / "report.html").read_text()
    assert page.count('class="input"') >= 4 and "Left of each pair is the input image that both edit" in page
    assert (run / "report" / "before_after.png").exists()


def test_pairs_of_an_editing_run_are_said_to_lack_its_input_images(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["preferences", str(run), "--output", str(tmp_path / "pairs.parquet")]) == 0
    assert "the prompts' input images are not in the file" in capsys.readouterr().out


def test_tables_and_categories_tell_images_of_one_text_apart(run: Path) -> None:
    recipe = Recipe.load(str(run / "recipe.toml"))
    table = training_table(Ledger(RunFolder(str(run)).storage, recipe.rollouts), "reward")
    names = {row.prompt for row in table.rows} if table else set()
    assert any(name.startswith("make it red [") for name in names) and "make it red" not in names
    # Two images of one text: 2 images of the one and 1 of the other count as two prompts of equal weight.
    about = [{"tag": "color", "image": name, "image_sha256": name * 64} for name in "aab"]
    means = means_by_category([Prompt("make it red", each) for each in about], np.array([1.0, 1.0, 0.0]))
    assert means == {"color": 0.5}
    assert [category(Prompt("a", {"tag": tag})) for tag in (None, "", 3)] == ["all", "", "3"]


@pytest.mark.rotated(every=3, group="resumed")
def test_a_stopped_run_resumes_to_the_same_bits_and_refuses_other_images(tables: dict, tmp_path: Path) -> None:
    from tests.system.conftest import final_fingerprint

    tables = edit_tables(tables, tmp_path) | {"evaluation": {"images": 4, "batch_size": 4}}
    checkpoint = {"every": 1, "keep": 2}
    whole = final_fingerprint(Recipe.parse({**tables, "name": "whole"}), serial=True)
    parts = {**tables, "name": "parts", "checkpoint": checkpoint}
    run_training(Recipe.parse({**parts, "rounds": 1}), serial=True)
    image = tmp_path / "inputs" / "1.png"
    before = image.read_bytes()
    Image.fromarray(input_pixels(7)).save(image)
    with pytest.raises(ValueError, match="was made with other files than those here: prompts.image_column"):
        run_training(Recipe.parse(parts), serial=True, resume=True)
    image.write_bytes(before)
    assert final_fingerprint(Recipe.parse(parts), serial=True, resume=True) == whole


def test_an_editing_family_needs_images_and_others_refuse_them(tables: dict, tmp_path: Path) -> None:
    edits = edit_tables(tables, tmp_path)
    with pytest.raises(ValueError) as error:
        build_components(Recipe.parse({**edits, "prompts": {"name": "animals", "images_per_prompt": 2}}))
    assert_refused("an editing family, and prompts without images", str(error.value))
    with pytest.raises(ValueError) as error:
        build_components(Recipe.parse({**edits, "policy": tables["policy"], "sampling": tables["sampling"]}))
    assert_refused("prompts with images, and a family that reads none", str(error.value))
    with pytest.raises(
        ValueError, match="the reward edit_preservation reads each prompt's input image, and 'cat' has none"
    ):
        run_training(
            Recipe.parse(
                {**tables, "prompts": {"name": "texts", "texts": ["cat"]}, "reward": {"name": "edit_preservation"}}
            ),
            serial=True,
        )


def test_a_python_program_hands_over_images_and_a_reward_that_asks_for_them(tables: dict, tmp_path: Path) -> None:
    seen: list[Any] = []

    def likeness(images: Any, prompts: Any, metadata: Any, inputs: Any) -> Any:
        seen.append(inputs)
        return -np.abs(images.astype(float) - inputs.pixels).mean(axis=(1, 2, 3))

    rows: list[dict[str, Any]] = [
        {"prompt": "a cat", "image": Image.fromarray(input_pixels(0)), "mask": input_mask(0)},
        {"prompt": "a dog", "image": input_pixels(1), "mask": input_mask(1)},
    ]
    recipe = Recipe.parse(edit_tables(tables, tmp_path) | {"rounds": 1, "evaluation": {"images": 2, "batch_size": 2}})
    run = train(recipe, prompts=rows, reward=likeness, serial=True)
    rows_seen = [row for inputs in seen for row in zip(inputs.pixels, inputs.masks, strict=True)]
    assert rows_seen
    for pixels, mask in rows_seen:
        number = 0 if np.array_equal(pixels, input_pixels(0)) else 1
        assert np.array_equal(pixels, input_pixels(number)) and np.array_equal(mask, input_mask(number))
    assert len(run.metrics) == 1
    resumed = train(recipe, prompts=rows, reward=likeness, serial=True, resume=True)
    assert len(resumed.metrics) == 1
    with pytest.raises(ValueError, match="prompts= has other rows than the run in .* began with"):
        train(recipe, prompts=rows[:1], reward=likeness, serial=True, resume=True)
    with pytest.raises(ValueError, match="prompts= has row 1, image is a int: give a path, a PIL image or an array"):
        train(recipe, prompts=[{"prompt": "a cat", "image": 3}], serial=True)
    for mode in ("F", "I"):
        with pytest.raises(
            ValueError, match=f"row 1, image is an image of Pillow's mode {mode}: it must have at most 8"
        ):
            train(recipe, prompts=[{"prompt": "a cat", "image": Image.new(mode, (16, 16))}], serial=True)


def test_pil_images_of_all_modes_of_8_bits_are_stored_as_they_look(tables: dict, tmp_path: Path) -> None:
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    rows = [{"prompt": mode, "image": white.convert(mode)} for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX")]
    source: Any = stored_rows(rows, Recipe.parse(edit_tables(tables, tmp_path)))
    source.check()
    assert (read_inputs([prompt.metadata for prompt in source.sampled()], (16, 16)).pixels >= 254).all()


def test_a_model_cards_program_gives_the_pipeline_its_input_image(run: Path) -> None:
    recipe = Recipe.load(str(run / "recipe.toml"))
    program = loading(recipe, components_of(recipe).policy, "alice/kontext", "make it red")
    assert compile(program, "card", "exec")
    assert "prompt='make it red', image=Image.open(\"image.png\")" in program and "from PIL import Image" in program
    assert "height=16, width=16, max_area=256, _auto_resize=False" in program

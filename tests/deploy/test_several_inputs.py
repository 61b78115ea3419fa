"""A run whose prompts have lists of input images: rewards, ledger, report, resume and Ray know all of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_ddpo import cli, train
from ray_ddpo.common.input_images import read_inputs
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.model_card.card import loading
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.deploy.driver.input_image_checks import check_prompt_files
from ray_ddpo.train import run_training
from tests.accepted_page import assert_refused
from tests.conftest import small_tables
from tests.input_files import input_pixels, input_table, save_several
from tests.system.conftest import final_fingerprint
from tests.tiny_families import MAKERS, policy_table


def several_tables(folder: Path, family: str = "flux2_klein_edit", **policy: Any) -> dict:
    """Return a small recipe with prompts of 1, 2, 3 and 1 input images."""
    model, tables = folder / family, small_tables(folder, folder)
    if not model.exists():
        MAKERS[family](model)
    return {
        **tables,
        "policy": policy_table(family, model, **policy),
        "prompts": input_table(save_several(folder / "inputs")) | {"images_per_prompt": 2},
        "sampling": {**tables["sampling"], "eta": 0.7},
        "reward": {"name": "function", "path": "tests.user_functions:likeness_to_all"},
        "learner": {**tables["learner"], "micro_batch_size": 4},
        "checkpoint": {"every": 1, "keep": 2},
        "evaluation": {"images": 4, "batch_size": 4},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe.parse(several_tables(tmp_path_factory.mktemp("several"), max_input_images=3))
    run_training(recipe, serial=True)
    return Path(recipe.run_path())


def test_rewards_and_the_ledger_know_every_image_of_a_list(run: Path) -> None:
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rounds[0]["ratio/max_abs_log"] <= 1e-5 and rounds[1]["kl_nats"] != 0
    recipe = Recipe.load(str(run / "recipe.toml"))
    rows = [
        row for index in (0, 1) for row in Ledger(RunFolder(str(run)).storage, recipe.rollouts).read(index).to_pylist()
    ]
    about = [json.loads(row["metadata"]) for row in rows]
    listed = {len(each["image"]): each for each in about if isinstance(each["image"], list)}
    assert set(listed) == {2, 3} and any(isinstance(each["image"], str) for each in about)
    assert all(len(each["image_sha256"]) == count for count, each in listed.items())
    assert all(
        int(row["reward"]) == (len(each["image"]) if isinstance(each["image"], list) else 1)
        for row, each in zip(rows, about, strict=True)
    )
    base = json.loads((run / "base.json").read_text())
    assert "7 input images" in base["prompts.image_column"]["path"]


def test_the_report_shows_every_image_of_a_list_beside_the_output(run: Path) -> None:
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report" / "report.html").read_text()
    gallery = page[page.index('id="gallery"') : page.index('id="extremes"')]
    assert gallery.count('class="input"') == 7 and gallery.count('class="inputs"') == 4
    assert "Further input images of a prompt stand below its first one." in gallery
    assert (run / "report" / "before_after.png").exists()


def test_sample_takes_several_images_and_refuses_more(run: Path, tmp_path: Path, capsys: Any) -> None:
    inputs = run.parents[1] / "inputs"

    def sampled(*names: str) -> np.ndarray:
        images = [word for name in names for word in ("--image", str(inputs / name))]
        assert cli.main(["sample", "--lora", str(run), "--output", str(tmp_path), *images, "a cat"]) == 0
        return np.asarray(Image.open(tmp_path / "000-a_cat-seed0.png"))

    both, swapped = sampled("0.png", "more_1.png"), sampled("more_1.png", "0.png")
    assert not np.array_equal(both, swapped)
    with pytest.raises(AssertionError):
        sampled("0.png", "1.png", "2.png", "3.png")
    assert "Flux2EditPolicy reads 3 input images a prompt, and 'a cat' has 4" in capsys.readouterr().err


def test_a_round_with_lists_of_images_is_sampled_again_with_the_same_bits(run: Path, capsys: Any) -> None:
    assert cli.main(["replay", str(run), "--round", "1"]) == 0
    assert "all 8 images are equal" in capsys.readouterr().out


@pytest.mark.rotated(every=3, group="resumed")
def test_a_stopped_run_resumes_to_the_same_bits_and_refuses_another_image_of_a_list(run: Path, tmp_path: Path) -> None:
    tables = several_tables(tmp_path, max_input_images=3)
    whole = final_fingerprint(Recipe.parse({**tables, "name": "whole"}), serial=True)
    parts = {**tables, "name": "parts"}
    run_training(Recipe.parse({**parts, "rounds": 1}), serial=True)
    image = tmp_path / "inputs" / "more_0.png"  # the third of a prompt
    before = image.read_bytes()
    Image.fromarray(input_pixels(7)).save(image)
    with pytest.raises(ValueError, match="was made with other files than those here: prompts.image_column"):
        run_training(Recipe.parse(parts), serial=True, resume=True)
    image.write_bytes(before)
    assert final_fingerprint(Recipe.parse(parts), serial=True, resume=True) == whole


@pytest.mark.system
@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("family", ["flux2_klein_edit", "qwen_image_edit_plus"])
def test_lists_of_images_give_the_same_bits_on_ray_and_in_one_process(
    family: str, tmp_path: Path, cluster: None
) -> None:
    keys = {"max_sequence_length": 80} if family == "qwen_image_edit_plus" else {}
    tables = several_tables(tmp_path, family, max_input_images=3, **keys) | {"max_policy_lag": 1}
    alone = Recipe.parse({**tables, "name": "alone"})
    on_ray = Recipe.parse({**tables, "name": "ray", "samplers": {"count": 2}})
    assert final_fingerprint(alone, serial=True) == final_fingerprint(on_ray)


@pytest.mark.parametrize("family", ["flux_kontext", "qwen_image_edit", "flux2_edit"])
def test_a_family_that_reads_one_image_refuses_several_before_it_is_loaded(family: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        run_training(Recipe.parse(several_tables(tmp_path, family)), serial=True)
    assert f"policy.name = '{family}' reads 1 input image a prompt, and 'a cat' has 2" in str(error.value)
    assert_refused("more input images of a prompt than the family reads", str(error.value))


def test_a_sharded_network_refuses_prompts_with_different_numbers_of_images(tmp_path: Path) -> None:
    tables = several_tables(tmp_path, max_input_images=3)
    sharded = Recipe.parse({**tables, "learner": {**tables["learner"], "shard_weights": True}})
    components = components_of(sharded)
    with pytest.raises(ValueError, match="shard_weights is true, and prompts have 1 or 2 or 3 input images"):
        check_prompt_files(sharded, components.policy, components.prompts)
    file = tmp_path / "inputs" / "prompts.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(row | {"image": ["0.png", "1.png"]}) for row in rows))
    check_prompt_files(sharded, components.policy, components.prompts)


def test_a_python_program_hands_over_lists_of_images(tmp_path: Path) -> None:
    seen: list[Any] = []

    def likeness(images: Any, prompts: Any, metadata: Any, inputs: Any) -> Any:
        seen.extend(inputs.images)
        return -np.abs(images.astype(float) - inputs.pixels).mean(axis=(1, 2, 3))

    tables = several_tables(tmp_path, max_input_images=2) | {"rounds": 1}
    rows: list[dict[str, Any]] = [{"prompt": "a cat", "image": [Image.fromarray(input_pixels(0)), input_pixels(1)]}]
    train(
        Recipe.parse({**tables, "evaluation": {"images": 2, "batch_size": 2}}),
        prompts=rows,
        reward=likeness,
        serial=True,
    )
    assert seen and all(np.array_equal(each, [input_pixels(0), input_pixels(1)]) for each in seen)
    with pytest.raises(ValueError, match="row 1, image 2 is a int: give a path, a PIL image or an array"):
        train(Recipe.parse(tables), prompts=[{"prompt": "a cat", "image": [input_pixels(0), 3]}], serial=True)


def test_a_model_cards_program_gives_the_pipeline_a_list(run: Path) -> None:
    recipe = Recipe.load(str(run / "recipe.toml"))
    program = loading(recipe, components_of(recipe).policy, "alice/klein", "make it red")
    assert compile(program, "card", "exec")
    assert 'image=[Image.open(f"image_{number}.png") for number in range(3)]' in program


def test_lists_of_one_image_are_that_image_and_other_values_are_refused(tmp_path: Path) -> None:
    from ray_ddpo.common.prompts import File

    file = save_several(tmp_path)
    prompts = File(path=str(file), image_column="image").sampled()
    inputs = read_inputs([prompt.metadata for prompt in prompts], (16, 16))
    assert [len(images) for images in inputs.images] == [1, 2, 3, 1]
    assert np.array_equal(inputs.images[2][0], input_pixels(2)) and inputs.pixels.shape == (4, 16, 16, 3)
    assert [len(images) for images in inputs.select([2, 0]).images] == [3, 1] and len(set(inputs.contents)) == 4
    assert prompts[1].key.count("[") == 2

    def of(value: Any, **keys: Any) -> Any:
        file.write_text(json.dumps({"prompt": "a cat", "image": value, "mask": value}))
        return File(path=str(file), image_column="image", **keys).sampled()[0]

    assert of(["0.png"]).metadata["image"] == of("0.png").metadata["image"]
    for value in ([], ["0.png", 3], ["0.png", None], ["0.png", "none.png"], {"a": "0.png"}):
        with pytest.raises(ValueError, match="line 1"):
            of(value)
    with pytest.raises(ValueError, match=r"its 'mask' is .*, and it must be the path of an image file"):
        of(["0.png", "1.png"], mask_column="mask")

"""A user's function as a reward: what it gets, what it may return, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.common.input_images import InputImages
from ray_ddpo.common.prompts import File, Prompt
from tests.input_files import input_pixels, save_inputs

IMAGES = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (10, 200)])


def test_the_function_gets_the_images() -> None:
    rewards = FunctionReward(path="tests.user_functions:brightness").load("cpu")(IMAGES, ["a", "b"], [{}, {}])
    assert rewards.tolist() == [10, 200]


def test_the_function_gets_prompts_and_metadata_in_order_and_may_return_integers() -> None:
    function = FunctionReward(path="tests.user_functions:prompts_and_metadata").load("cpu")
    rewards = function(IMAGES, ["cat", "horse"], [{"bonus": 1}, {"bonus": 10}])
    assert rewards.tolist() == [4, 15] and rewards.dtype == np.float32


def test_one_number_for_all_images_is_refused_with_both_shapes() -> None:
    function = FunctionReward(path="tests.user_functions:one_number_for_all").load("cpu")
    with pytest.raises(
        ValueError,
        match=r"one_number_for_all' returned float64 of shape \(\) for 2 images: it must .* of shape \(2,\)",
    ):
        function(IMAGES, ["a", "b"], [{}, {}])


def test_a_path_without_a_function_is_refused() -> None:
    with pytest.raises(ValueError, match="path"):
        FunctionReward(path="tests.user_functions")


def test_a_missing_function_is_named_with_its_module_when_the_reward_is_loaded() -> None:
    with pytest.raises(ValueError, match="reward.path is 'tests.user_functions:sharpness'.*has no 'sharpness'"):
        FunctionReward(path="tests.user_functions:sharpness").load("cpu")


def likeness(images: object, prompts: object, metadata: object, inputs: object = None) -> list[float]:
    raise AssertionError("it is not called")


def of_clips(clips: object, prompts: object, metadata: object) -> list[float]:
    raise AssertionError("it is not called")


@pytest.mark.parametrize(("function", "asked"), [(likeness, "inputs"), (of_clips, "clips")])
def test_a_differentiable_function_of_other_arrays_is_refused_before_the_run(function: Any, asked: str) -> None:
    reward = FunctionReward.of(function, differentiable=True)
    for check in (lambda: reward.check_prompts([]), lambda: reward.load("cpu")):
        with pytest.raises(ValueError, match=f"has a parameter {asked}, and differentiable is true"):
            check()


def test_input_images_with_a_default_are_asked_of_no_prompt() -> None:
    def likeness(images: object, prompts: list[str], metadata: object, inputs: object = None) -> list[float]:
        return [0.0 if inputs is None else 1.0] * len(prompts)

    def needed(images: object, prompts: list[str], metadata: object, inputs: object) -> list[float]:
        raise AssertionError("it is not called")

    optional, required = FunctionReward.of(likeness), FunctionReward.of(needed)
    optional.check_prompts([Prompt("a")])
    assert optional.load("cpu")(IMAGES, ["a", "b"], [{}, {"image": "a column of the user's"}]).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="reads each prompt's input image, and 'a' has none"):
        required.check_prompts([Prompt("a")])


def test_input_images_with_a_default_are_given_where_all_prompts_have_them(tmp_path: Path) -> None:
    def likeness(
        images: object, prompts: list[str], metadata: object, inputs: InputImages | None = None
    ) -> list[float]:
        return [0.0] * len(prompts) if inputs is None else [float(each.mean()) for each in inputs.pixels]

    prompts = File(path=str(save_inputs(tmp_path, size=(4, 4))), image_column="image").sampled()
    score = FunctionReward.of(likeness).load("cpu")
    means = [input_pixels(0, (4, 4)).mean(), input_pixels(1, (4, 4)).mean()]
    assert score(IMAGES, ["a", "b"], [prompt.metadata for prompt in prompts[:2]]).tolist() == pytest.approx(means)

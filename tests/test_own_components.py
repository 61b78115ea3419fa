"""Prompt sources, algorithms, trackers and rewards of the user's own are tried before the first round."""

from pathlib import Path
from typing import Any

import pytest

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RewardWorkersTable, RuntimeTable
from ray_ddpo.common.trackers.fan_out import FanOut
from ray_ddpo.common.trackers.tracker import RunInfo
from ray_ddpo.deploy.commands.doctor.ratio_measurement import sample_some, score_again
from ray_ddpo.deploy.driver.components import build_components, build_reward, components_of
from ray_ddpo.deploy.driver.trial_prompts import trial_prompts
from ray_ddpo.learner.learner import Learner
from tests import own_components
from tests.own_components import Column, NeedsLargeImages, Quiet, Unreachable
from tests.tiny_families import save_tiny_shapes


def with_own(tables: dict, **own: dict[str, Any]) -> Recipe:
    return Recipe.parse(tables | own)


def test_a_users_prompt_source_is_sampled_twice_with_equal_results(tables: dict) -> None:
    components = build_components(with_own(tables, prompts={"name": "tests.own_components:Cats"}))
    first, second = trial_prompts(components)
    assert first.text.startswith("cat number") and trial_prompts(components) == (first, second)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"name": "tests.own_components:OnlyTexts"},
            "what OnlyTexts.load returned sampled 'a cat': expected a ray_ddpo.Prompt",
        ),
        (
            {"name": "function", "path": "tests.user_functions:no_prompt"},
            "tests.user_functions:no_prompt raised: tests.user_functions:no",
        ),
        (
            {"name": "tests.own_components:Column"},
            "prompts.name is 'tests.own_components:Column': it must be derived from PromptSource",
        ),
    ],
)
def test_a_source_without_prompts_is_refused(table: dict, message: str, tables: dict) -> None:
    with pytest.raises(ValueError) as error:
        trial_prompts(build_components(with_own(tables, prompts=table)))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Misspelt",
            "Misspelt.columns has ['reference_mean']: the columns of a TransitionBatch are ['proximal_log_probs', "
            "'proximal_means', 'behavior_means', 'reference_means']",
        ),
        (
            "OfTransitions",
            "OfTransitions.columns has ['behavior_means']: the columns of a NoisedBatch are ['old_predictions', "
            "'reference_predictions', 'old_errors', 'reference_errors']",
        ),
    ],
)
def test_an_unknown_column_is_refused_with_the_known_ones(name: str, message: str, tables: dict) -> None:
    with pytest.raises(ValueError) as error:
        components_of(with_own(tables, algorithm={"name": f"tests.own_components:{name}"}))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "OneForAll",
            "OneForAll.compute_advantages returned float64 np.float64(0.5): expected finite floats of shape (2,), one for each",
        ),
        (
            "LosesGradients",
            "LosesGradients.compute_loss returned a loss without gradients: expected gradients of what is trained",
        ),
    ],
)
def test_an_algorithm_is_tried_by_the_learner(name: str, message: str, tables: dict) -> None:
    tables["learner"]["micro_batch_size"] = 4
    recipe = with_own(tables, algorithm={"name": f"tests.own_components:{name}"})
    components = build_components(recipe)
    with pytest.raises(ValueError) as error:
        Learner(components.policy, components.algorithm, recipe)
    assert str(error.value).startswith(message)


def test_the_doctor_tries_a_family_as_sampler_and_as_learner(tables: dict, tmp_path: Path) -> None:
    model = str(save_tiny_shapes(tmp_path))
    tables["learner"]["micro_batch_size"] = 4
    own = {"prompts": {"name": "texts", "texts": ["disc", "ring"]}}
    policy = {"name": "tests.own_components:FloatImages", "model": model}
    with pytest.raises(ValueError, match=r"ShapesPolicy.decode returned float32 of shape \(2, 3, 16, 16\)"):
        sample_some(with_own(tables, policy=policy, **own))
    policy["name"] = "tests.own_components:ForgetsWeights"
    recipe = with_own(tables, policy=policy, **own)
    with pytest.raises(ValueError, match="ShapesPolicy.restore gave other weights than ShapesPolicy.save wrote"):
        score_again(recipe, sample_some(recipe))


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        (Quiet(), "Quiet.start returned NoneType: expected a ray_ddpo.LiveTracker"),
        (
            Unreachable(),
            f"Unreachable.start raised ConnectionError: no route to the service ({own_components.__file__}:",
        ),
    ],
)
def test_a_tracker_that_cannot_start_is_named(tracker: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        FanOut({"mine": tracker}).start(RunInfo("run", tmp_path, {}, 1, 0))
    assert str(error.value).startswith(message)


def worker(reward: Reward) -> RewardWorker:
    return RewardWorker({"mine": reward}, RewardWorkersTable(), RuntimeTable(), tried=True)


def test_a_reward_of_another_shape_is_refused_before_the_first_round(tables: dict) -> None:
    with pytest.raises(ValueError, match=r"the reward 'mine' returned float64 of shape \(2, 1\) for 2 "):
        worker(Column())
    function = with_own(tables, reward={"name": "function", "path": "tests.user_functions:one_number_for_all"}).reward
    assert function is not None
    with pytest.raises(ValueError, match="tests.user_functions:one_number_for_all"):
        worker(build_reward(function))


def test_a_reward_that_raises_at_synthetic_images_is_tried_on_the_first_batch() -> None:
    assert worker(NeedsLargeImages()).names == ("mine",)

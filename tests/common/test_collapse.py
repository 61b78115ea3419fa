"""What is called a collapse of the reward, and what is not."""

import numpy as np
import pytest

from ray_ddpo.common.metrics.diagnoses import CollapseWatch


def watched(means: list[float], std: float, groups: int = 64) -> list[int]:
    """The rounds in which a collapse was told."""
    watch = CollapseWatch(groups, 0.01)
    return [round_index for round_index, mean in enumerate(means) if watch.add(round_index, mean, std)]


@pytest.mark.parametrize(
    ("means", "std", "groups"),
    [
        ([-2.491, -4.33, -4.4, -4.5], 0.335, 64),  # the demo with 75 times its learning rate
        ([-2.302, -5.263, -4.934, -5.553], 1.11, 8),  # tiny/animal_classifier with as much
    ],
)
def test_a_fall_that_no_noise_explains_is_told_once(means: list[float], std: float, groups: int) -> None:
    assert watched(means, std, groups) == [1]


def test_a_reward_that_comes_back_and_falls_again_has_collapsed_twice() -> None:
    assert watched([0.0, -9.0, -9.0, -0.1, 0.0, -0.2, 0.1, -0.1, 0.0, -9.0], 1.0) == [1, 9]


def test_it_says_from_where_to_where_and_what_to_change() -> None:
    watch = CollapseWatch(64, 0.75)
    assert watch.add(0, -2.5, 0.5) is None and watch.at_end() is None
    assert watch.add(1, -4.5, 0.5) == (
        "the reward collapsed in round 2: from -2.5 to -4.5, 4.0 standard deviations of the images' rewards; "
        "most likely learner.learning_rate = 0.75 is too high: try a third of it"
    )
    assert "has not come back: it ends at -4.5" in str(watch.at_end())
    watch.add(2, -2.6, 0.5)
    assert watch.at_end() is None


@pytest.mark.parametrize("images_per_prompt", [1, 8])
@pytest.mark.parametrize("groups", [1, 2, 8, 64])
def test_noise_and_different_prompts_are_no_collapse(groups: int, images_per_prompt: int) -> None:
    alarms = 0
    for seed in range(40):
        generator, watch = np.random.default_rng(seed), CollapseWatch(groups, 0.01)
        for round_index in range(60):
            of_prompts = generator.normal(0.01 * round_index, 1, (groups, 1))  # prompts differ, and it learns
            rewards = of_prompts + generator.normal(0, 1, (groups, images_per_prompt))
            alarms += watch.add(round_index, float(rewards.mean()), float(rewards.std())) is not None
    assert alarms == 0


def test_rounds_without_a_number_or_without_spread_are_no_collapse() -> None:
    assert watched([1.0, float("nan"), -9.0], 0.0) == []

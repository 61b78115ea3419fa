"""Diagnoses of a run: the bottleneck of rounds whose numbers follow by hand, and collapses of the reward."""

import math

import numpy as np
import pytest

from ray_ddpo.common.metrics.diagnoses import CollapseWatch, Metrics, Roles, bottleneck


def rounds_of(sampling: float, scoring: float, learning: float, seconds: float, samplers: int = 2) -> Metrics:
    """Return a round of `seconds` in which every worker was available all the time, with one reward worker."""
    return {
        "seconds/sample": sampling,
        "seconds/score": scoring,
        "seconds/learn": learning,
        "seconds/round": seconds,
        "idle/sampler": 1 - sampling / (samplers * seconds),
        "idle/reward_worker": 1 - scoring / seconds,
        "idle/learner": 1 - learning / seconds,
    }


def roles(lag: int, samplers: int = 2, reward_workers: int = 1, tasks: int = 24, **changes: object) -> Roles:
    return Roles(lag=lag, samplers=samplers, reward_workers=reward_workers, tasks=tasks, **changes)


def test_roles_that_take_turns_are_busy_together_and_the_rest_is_explained() -> None:
    # Two samplers at work for 4 of 10 s each, and a learner for 5.5.
    rounds = [rounds_of(8.0, 1.0, 5.5, seconds=10.0)]
    assert bottleneck(rounds, roles(0, tasks=4, kind="colocated")) == (
        "samplers and learner share their devices in turns: sampling 40 % of the time, learning 55 %; only more or "
        "faster devices would help"
    )
    slow_rewards = [rounds_of(8.0, 3.0, 4.0, seconds=10.0)]
    assert bottleneck(slow_rewards, roles(0, tasks=4, kind="colocated")).endswith(
        "learning 40 %, idle 20 %, while the last images are scored and all wait for the slowest: more reward workers "
        "would help"
    )
    odd = bottleneck(slow_rewards, roles(0, tasks=5, kind="colocated"))
    assert "with a multiple of 2 for sampling.batches_per_round" in odd
    assert bottleneck([], roles(0, kind="colocated")).startswith("no round was done")


def test_in_step_both_sides_wait_and_one_round_of_lag_would_overlap_them() -> None:
    # Two samplers take 12 s for 24 tasks of 1 s, the update 8 s. Overlapped: max(24 / 2, 2.4, 8, 20 / 2).
    sentence = bottleneck([rounds_of(24.0, 2.4, 8.0, seconds=20.0)], roles(0))
    assert sentence == (
        "samplers idle 40 %, learner idle 60 %: they wait for each other; max_policy_lag = 1 would overlap them, "
        "and a round would ideally take 12 s instead of 20 s"
    )


def test_in_step_the_round_itself_may_be_what_stays_when_the_two_sides_overlap() -> None:
    # Two tasks of 6 s side by side, their scoring of 3 s each in turn, 8 s: 20 s. Two rounds in flight: 10 s each.
    sentence = bottleneck([rounds_of(12.0, 6.0, 8.0, seconds=20.0)], roles(0, tasks=2))
    assert sentence.endswith("ideally take 10 s instead of 20 s")


def test_a_learner_that_waits_for_busy_samplers_asks_for_one_more() -> None:
    # 19.4 s of sampling in 10 s by two samplers: 97 %. By three: 19.4 / 3 = 6.47 s, more than the update's 5.9 s.
    sentence = bottleneck([rounds_of(19.4, 1.0, 5.9, seconds=10.0)], roles(1))
    assert sentence == (
        "learner idle 41 %: add a sampler (samplers are busy 97 % of the time); "
        "with 3 a round would ideally take 6.47 s instead of 10 s"
    )


def test_one_more_sampler_helps_only_until_the_learner_is_the_longest_part() -> None:
    sentence = bottleneck([rounds_of(19.4, 1.0, 8.5, seconds=10.0)], roles(1))
    assert sentence.endswith("with 3 a round would ideally take 8.5 s instead of 10 s")


def test_more_samplers_help_in_step_if_the_round_is_nearly_all_sampling() -> None:
    # 24 tasks of 0.79 s: by three samplers 8 × 0.79 s, and 0.4 s of the update.
    sentence = bottleneck([rounds_of(19.0, 0.0, 0.4, seconds=10.0)], roles(0))
    assert sentence.startswith("learner idle 96 %: add a sampler (samplers are busy 95 % of the time)")
    assert sentence.endswith("with 3 a round would ideally take 6.73 s instead of 10 s")


def test_tasks_are_whole_where_one_more_sampler_is_thought_of() -> None:
    # Four tasks of 4.75 s on three samplers take as long as on two.
    sentence = bottleneck([rounds_of(19.0, 0.0, 0.4, seconds=10.0)], roles(0, tasks=4))
    assert sentence.endswith("with 3 a round would ideally take 9.9 s instead of 10 s")


def test_busy_reward_workers_are_named() -> None:
    # Two reward workers: 9.8 / 2 = 4.9 s, less than the 6 s of sampling.
    sentence = bottleneck([rounds_of(12.0, 9.8, 5.0, seconds=10.0)], roles(1))
    assert sentence == (
        "learner idle 50 %: add a reward worker (reward workers are busy 98 % of the time); "
        "with 2 a round would ideally take 6 s instead of 10 s"
    )


def test_samplers_that_wait_for_the_learner_are_too_many() -> None:
    # 12 s of sampling in a round of 10 s: three samplers are busy 40 %, and two would be ready after 6 s.
    sentence = bottleneck([rounds_of(12.0, 1.0, 9.8, seconds=10.0, samplers=3)], roles(1, samplers=3))
    assert sentence == (
        "samplers idle 60 %: the learner is the bottleneck (busy 98 % of the time); a faster device for it, more "
        "learner.world_size or a larger learner.micro_batch_size would help; 2 of the 3 samplers would do"
    )


def test_on_gpus_the_split_of_the_plan_is_named() -> None:
    # Four GPUs, 12 s of sampling and 9.8 s of learning: 2 + 2 would take max(12 / 2, 9.8 / 2) = 6 s.
    on_four = roles(1, samplers=3, gpus=4, images_per_step=12)
    sentence = bottleneck([rounds_of(12.0, 1.0, 9.8, seconds=10.0, samplers=3)], on_four)
    assert sentence.endswith(
        "2 of the 3 samplers would do; on 4 GPUs, 2 samplers and 2 learner ranks would ideally take 6 s a round, "
        "and ddpo plan prints the keys"
    )


def test_a_split_that_the_recipe_does_not_allow_is_not_named() -> None:
    odd = roles(1, samplers=3, gpus=4, images_per_step=5)  # no other number of ranks divides 5 images
    assert bottleneck([rounds_of(12.0, 1.0, 9.8, seconds=10.0, samplers=3)], odd).endswith("samplers would do")


def test_seconds_of_several_ranks_are_those_of_one_rank_times_their_number() -> None:
    # 1 + 3 GPUs: an update of 3 s on three ranks is one of 9 s; 12 s of sampling by two samplers, 4.5 s by two ranks.
    now = roles(1, samplers=1, ranks=3, gpus=4, images_per_step=12)
    sentence = bottleneck([rounds_of(12.0, 0.1, 3.0, seconds=12.5, samplers=1)], now)
    assert "2 samplers and 2 learner ranks would ideally take 6 s a round" in sentence


def test_roles_on_the_same_gpus_take_turns() -> None:
    shared = roles(0, samplers=2, ranks=2, gpus=2, images_per_step=24, kind="colocated")
    sentence = bottleneck([rounds_of(12.0, 0.0, 13.0, seconds=19.5)], shared)
    assert sentence.startswith(
        "samplers and learner share their devices in turns: sampling 31 % of the time, learning 67 %"
    )


def test_the_last_sampler_is_not_called_one_too_many() -> None:
    sentence = bottleneck([rounds_of(4.0, 1.0, 9.8, seconds=10.0, samplers=1)], roles(1, samplers=1))
    assert sentence.startswith("samplers idle 60 %: the learner is the bottleneck") and "would do" not in sentence


def test_if_no_role_is_busy_more_lag_overlaps_more() -> None:
    # One task of 9 s, 6 s of scoring, 9 s of the update: 24 s from first task to weights, in two rounds at once 12 s.
    # In three: 24 / 3 = 8 s, but the sampler needs 9 s.
    sentence = bottleneck([rounds_of(9.0, 6.0, 9.0, seconds=12.0, samplers=1)], roles(1, samplers=1, tasks=1))
    assert sentence == (
        "samplers idle 25 %, reward workers idle 50 %, learner idle 25 %: they wait for each other; "
        "max_policy_lag = 2 would overlap them, and a round would ideally take 9 s instead of 12 s"
    )


def test_where_both_sides_are_busy_neither_is_the_bottleneck() -> None:
    sentence = bottleneck([rounds_of(19.6, 1.0, 9.5, seconds=10.0)], roles(1))
    assert sentence == (
        "samplers (98 %) and learner (95 %) are busy all the time: neither waits for the other, "
        "and only more or faster ones of both would help"
    )


def test_only_the_last_half_counts_because_the_first_rounds_warm_up() -> None:
    warm_up, steady = rounds_of(2.0, 1.0, 1.0, seconds=100.0), rounds_of(19.4, 1.0, 5.9, seconds=10.0)
    assert bottleneck([warm_up, warm_up, steady, steady], roles(1)) == bottleneck([steady], roles(1))


def test_the_last_half_is_its_mean() -> None:
    halves = [rounds_of(19.0, 1.0, 5.0, seconds=10.0), rounds_of(19.8, 1.0, 6.8, seconds=10.0)]
    rounds = [halves[0], halves[0], *halves]
    assert bottleneck(rounds, roles(1)) == bottleneck([rounds_of(19.4, 1.0, 5.9, seconds=10.0)], roles(1))


def test_a_round_in_which_a_role_was_not_there_is_left_out_of_its_mean() -> None:
    steady = rounds_of(19.4, 1.0, 5.9, seconds=10.0)
    gone = {**steady, "idle/sampler": math.nan, "idle/reward_worker": math.nan}
    assert bottleneck([gone, gone, gone, steady], roles(1)) == bottleneck([steady], roles(1))
    assert "nan" not in bottleneck([gone], roles(1))


@pytest.mark.parametrize("lag", [0, 1])
def test_without_rounds_it_says_so(lag: int) -> None:
    assert bottleneck([], roles(lag)) == "no round was done, so there is no bottleneck to name"


def watched(means: list[float], std: float, groups: int = 64) -> list[int]:
    """Return the rounds in which a collapse was reported."""
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


@pytest.mark.rotated(every=3)
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

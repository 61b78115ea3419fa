"""The bottleneck's sentence, for rounds whose numbers follow by hand from what each part takes."""

import math

import pytest

from ray_ddpo.common.metrics.diagnoses import Metrics, bottleneck


def rounds_of(sampling: float, scoring: float, learning: float, seconds: float, samplers: int = 2) -> Metrics:
    """A round of `seconds` in which every worker was there the whole time, with one reward worker."""
    return {
        "seconds/sample": sampling,
        "seconds/score": scoring,
        "seconds/learn": learning,
        "seconds/round": seconds,
        "idle/sampler": 1 - sampling / (samplers * seconds),
        "idle/reward_worker": 1 - scoring / seconds,
        "idle/learner": 1 - learning / seconds,
    }


def test_in_step_both_sides_wait_and_one_round_of_lag_would_overlap_them() -> None:
    # Two samplers sample for 11 s, the last task's scoring takes 1 s, the update 8 s. Overlapped: max(22 / 2, 3, 8, 20 / 2).
    sentence = bottleneck([rounds_of(22.0, 3.0, 8.0, seconds=20.0)], 0, samplers=2, reward_workers=1)
    assert sentence == (
        "samplers idle 45 %, learner idle 60 %: they wait for each other; max_policy_lag = 1 would overlap them, "
        "and a round would ideally take 11 s instead of 20 s"
    )


def test_in_step_the_round_itself_may_be_what_stays_when_the_two_sides_overlap() -> None:
    # A slow last scoring: 6 + 6 + 8 s in step. Overlapped: max(12 / 2, 7, 8, 20 / 2).
    sentence = bottleneck([rounds_of(12.0, 7.0, 8.0, seconds=20.0)], 0, samplers=2, reward_workers=1)
    assert sentence.endswith("ideally take 10 s instead of 20 s")


def test_a_learner_that_waits_for_busy_samplers_asks_for_one_more() -> None:
    # 19.4 s of sampling in 10 s by two samplers: 97 %. By three: 19.4 / 3 = 6.47 s, more than the update's 5.9 s.
    sentence = bottleneck([rounds_of(19.4, 1.0, 5.9, seconds=10.0)], 1, samplers=2, reward_workers=1)
    assert sentence == (
        "learner idle 41 %: add a sampler (samplers are busy 97 % of the time); "
        "with 3 a round would ideally take 6.47 s instead of 10 s"
    )


def test_one_more_sampler_helps_only_until_the_learner_is_the_longest_part() -> None:
    sentence = bottleneck([rounds_of(19.4, 1.0, 8.5, seconds=10.0)], 1, samplers=2, reward_workers=1)
    assert sentence.endswith("with 3 a round would ideally take 8.5 s instead of 10 s")


def test_in_step_too_more_samplers_help_where_the_round_is_nearly_all_drawing() -> None:
    sentence = bottleneck([rounds_of(19.0, 0.1, 0.4, seconds=10.0)], 0, samplers=2, reward_workers=1)
    assert sentence.startswith("learner idle 96 %: add a sampler (samplers are busy 95 % of the time)")


def test_busy_reward_workers_are_named() -> None:
    # Two reward workers: 9.8 / 2 = 4.9 s, less than the 6 s of sampling.
    sentence = bottleneck([rounds_of(12.0, 9.8, 5.0, seconds=10.0)], 1, samplers=2, reward_workers=1)
    assert sentence == (
        "learner idle 50 %: add a reward worker (reward workers are busy 98 % of the time); "
        "with 2 a round would ideally take 6 s instead of 10 s"
    )


def test_samplers_that_wait_for_the_learner_are_too_many() -> None:
    # 12 s of sampling in a round of 10 s: three samplers are busy 40 %, and two would be ready after 6 s.
    sentence = bottleneck([rounds_of(12.0, 1.0, 9.8, seconds=10.0, samplers=3)], 1, samplers=3, reward_workers=1)
    assert sentence == (
        "samplers idle 60 %: the learner is the bottleneck (busy 98 % of the time); a faster device for it, more "
        "learner.world_size or a larger learner.micro_batch_size would help; 2 of the 3 samplers would do"
    )


def test_the_last_sampler_is_not_called_one_too_many() -> None:
    sentence = bottleneck([rounds_of(4.0, 1.0, 9.8, seconds=10.0, samplers=1)], 1, samplers=1, reward_workers=1)
    assert sentence.startswith("samplers idle 60 %: the learner is the bottleneck") and "would do" not in sentence


def test_where_all_lag_and_nobody_is_busy_more_lag_overlaps_more() -> None:
    # 24 s from first task to weights, in two rounds at once: 12 s. In three: 8 s, and no part is longer than 7.5 s.
    sentence = bottleneck([rounds_of(15.0, 6.0, 6.0, seconds=12.0)], 1, samplers=2, reward_workers=1)
    assert sentence == (
        "samplers idle 38 %, reward workers idle 50 %, learner idle 50 %: they wait for each other; "
        "max_policy_lag = 2 would overlap them, and a round would ideally take 8 s instead of 12 s"
    )


def test_where_both_sides_are_busy_neither_is_the_bottleneck() -> None:
    sentence = bottleneck([rounds_of(19.6, 1.0, 9.5, seconds=10.0)], 1, samplers=2, reward_workers=1)
    assert sentence == (
        "samplers (98 %) and learner (95 %) are busy all the time: neither waits for the other, "
        "and only more or faster ones of both would help"
    )


def test_only_the_last_half_counts_because_the_first_rounds_warm_up() -> None:
    warm_up, steady = rounds_of(2.0, 1.0, 1.0, seconds=100.0), rounds_of(19.4, 1.0, 5.9, seconds=10.0)
    expected = bottleneck([steady], 1, samplers=2, reward_workers=1)
    assert bottleneck([warm_up, warm_up, steady, steady], 1, samplers=2, reward_workers=1) == expected


def test_the_last_half_is_its_mean() -> None:
    halves = [rounds_of(19.0, 1.0, 5.0, seconds=10.0), rounds_of(19.8, 1.0, 6.8, seconds=10.0)]
    rounds = [halves[0], halves[0], *halves]
    assert bottleneck(rounds, 1, 2, 1) == bottleneck([rounds_of(19.4, 1.0, 5.9, seconds=10.0)], 1, 2, 1)


def test_a_round_in_which_a_role_was_not_there_is_left_out_of_its_mean() -> None:
    steady = rounds_of(19.4, 1.0, 5.9, seconds=10.0)
    gone = {**steady, "idle/sampler": math.nan, "idle/reward_worker": math.nan}
    assert bottleneck([gone, gone, gone, steady], 1, 2, 1) == bottleneck([steady], 1, 2, 1)
    assert "nan" not in bottleneck([gone], 1, 2, 1)


@pytest.mark.parametrize("lag", [0, 1])
def test_without_rounds_it_says_so(lag: int) -> None:
    assert bottleneck([], lag, samplers=2, reward_workers=1) == "no round was done, so there is no bottleneck to name"

"""Seconds and idle shares of layouts, worked out by hand."""

from dataclasses import replace

import pytest

from ray_ddpo.common.balance import RoundLoad, best, expected, layouts

# Eight tasks of 1 s, and an update of 6 s on a single rank.
LOAD = RoundLoad(tasks=8, sample=1.0, learn=6.0, images_per_step=24)
# Twelve tasks, in the proportion of LoRA training with guidance and all steps trained on: 1 : 2.13.
LORA = RoundLoad(tasks=12, sample=1.0, learn=12 * 2.13, images_per_step=12, lag=1)


def test_eight_tasks_on_three_samplers_take_three_task_times() -> None:
    layout = expected(LOAD, samplers=3, ranks=2)
    assert layout.seconds == pytest.approx(3 + 6 / 2)
    assert layout.idle_samplers == pytest.approx(1 - (8 / 3) / 6)
    assert layout.idle_ranks == pytest.approx(1 - 3 / 6)
    assert layout.idle_gpus == pytest.approx(1 - (8 + 6) / (5 * 6))  # 14 s of work in 6 s on 5 GPUs


def test_at_lag_0_the_last_task_is_scored_before_the_update() -> None:
    # Four samplers are done after 1 and 2 s; one worker scores four tasks of 0.2 s after each, so until 2.8 s.
    assert expected(replace(LOAD, score=0.2), samplers=4, ranks=1).seconds == pytest.approx(2.8 + 6)
    # Two workers need 0.4 s for the last four.
    assert expected(replace(LOAD, score=0.2, reward_workers=2), 4, 1).seconds == pytest.approx(2.4 + 6)


def test_with_lag_samplers_go_on_with_the_next_round() -> None:
    # No sampler waits for the others: 8 tasks / 3 samplers, not 3 task times.
    layout = expected(replace(LOAD, learn=0.3, lag=1), samplers=3, ranks=1)
    assert layout.seconds == pytest.approx(8 / 3) and layout.idle_samplers == pytest.approx(0)
    assert layout.idle_ranks == pytest.approx(1 - 0.3 / (8 / 3))


@pytest.mark.parametrize(("lag", "seconds"), [(0, 4.1), (1, 2.05), (2, 2.0), (3, 2.0)])
def test_lag_shares_the_latency_of_a_round(lag: int, seconds: float) -> None:
    # One task of 2 s, 0.1 s of scoring, an update of 2 s: 4.1 s from first task to weights, lag + 1 rounds in flight.
    load = RoundLoad(tasks=1, sample=2.0, learn=2.0, score=0.1, lag=lag)
    assert expected(load, 1, 1).seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({"sample": 1.0, "learn": 2.0}, 4.0),  # 8 tasks / 2 samplers
        ({"sample": 0.2, "learn": 12.0}, 6.0),  # 12 s / 2 ranks
        ({"sample": 0.2, "learn": 2.0, "score": 1.0}, 8.0),  # one reward worker
    ],
)
def test_with_lag_the_slowest_role_decides(changes: dict, seconds: float) -> None:
    assert expected(replace(LOAD, lag=2, **changes), 2, 2).seconds == pytest.approx(seconds)


def test_a_round_in_parts_overlaps_at_lag_0() -> None:
    # Four parts of two tasks on one sampler, at 2, 4, 6, 8 s; each part's update takes 1.5 s: the last ends at 9.5 s.
    assert expected(replace(LOAD, parts=4), 1, 1).seconds == pytest.approx(9.5)


def test_colocated_gpus_take_turns_and_are_always_busy() -> None:
    layout = expected(LOAD, 4, 4, "colocated", gpus=4)
    assert layout.seconds == pytest.approx(8 / 4 + 6 / 4)
    assert layout.idle_samplers == pytest.approx(1.5 / 3.5) and layout.idle_ranks == pytest.approx(2 / 3.5)
    assert layout.idle_gpus == pytest.approx(0) and layout.gpus_used == 4
    # Three samplers need three task times for eight tasks: 9 s of samplers' time for 8 s of work.
    assert expected(LOAD, 3, 3, "colocated").idle_gpus == pytest.approx(1 - (8 + 6) / (3 * (3 + 2)))


def test_rules_of_a_recipe_limit_the_ranks() -> None:
    load = replace(LOAD, images_per_step=12, transitions_per_image=5, micro_batch_size=4)
    # 12 images: 1, 2, 3, 4, 6 or 12 ranks. Micro-batches of 4 need 60, 30, 20, 15, 10, 5 transitions to be multiples.
    assert [ranks for ranks in range(1, 13) if load.allows(ranks)] == [1, 3]
    assert {layout.ranks for layout in layouts(load, 8)} == {1, 3}
    assert [ranks for ranks in range(1, 13) if replace(load, micro_batch_size=None).allows(ranks)] == [
        1,
        2,
        3,
        4,
        6,
        12,
    ]


def test_four_gpus_at_lag_1_take_one_sampler_and_three_ranks() -> None:
    # 3 + 1: 25.56 s. 2 + 2: 12.78 s. 1 + 3: 12 s of sampling, 8.52 s of learning.
    found = best(LORA, 4)
    assert (found.kind, found.samplers, found.ranks) == ("dedicated", 1, 3)
    assert found.seconds == pytest.approx(12) and found.idle_ranks == pytest.approx(1 - 8.52 / 12)
    shipped = expected(LORA, 3, 1, gpus=4)
    assert shipped.seconds == pytest.approx(25.56) and shipped.idle_samplers == pytest.approx(1 - 4 / 25.56)


def test_equal_gpus_at_lag_0_are_colocated() -> None:
    load = replace(LORA, lag=0, tasks=32, learn=32 * 2.13, images_per_step=64)
    found = best(load, 8)
    assert (found.kind, found.samplers, found.ranks) == ("colocated", 8, 8)
    assert found.seconds == pytest.approx(4 + 4 * 2.13) and found.idle_gpus == pytest.approx(0)
    # 7 + 1: ⌈32 / 7⌉ + 68.16 s, 5.8 times as long.
    assert expected(load, 7, 1).seconds / found.seconds == pytest.approx((5 + 68.16) / 12.52)


def test_lag_and_parts_leave_no_turns_to_take() -> None:
    kinds = {load: {each.kind for each in layouts(load, 4)} for load in (LORA, replace(LORA, lag=0, parts=2))}
    assert set(map(frozenset, kinds.values())) == {frozenset({"dedicated"})}
    assert best(LORA, 1).kind == "colocated" and best(LORA, 1).seconds == pytest.approx(12 * 3.13)


def test_gpus_that_no_rule_lets_work_are_counted_as_idle() -> None:
    # 2 images a step: at most two ranks, and one task: at lag 0 one sampler. Five GPUs, two of which work in turns.
    load = RoundLoad(tasks=1, sample=1.0, learn=1.0, images_per_step=2)
    found = best(load, 5)
    assert found.gpus_used < 5 and found.idle_gpus > 0.5
    assert found.idle_gpus == pytest.approx(1 - 2 / (5 * found.seconds))


def test_very_many_tasks_are_followed_in_groups() -> None:
    load = RoundLoad(tasks=20_000, sample=1.0, learn=10_000.0, images_per_step=20_000)
    assert expected(load, 10, 10).seconds == pytest.approx(2_000 + 1_000, rel=0.01)


def test_without_gpus_there_is_no_layout() -> None:
    with pytest.raises(ValueError, match="gpus is 0"):
        best(LOAD, 0)


def test_no_layout_has_more_samplers_than_the_recipe_allows() -> None:
    dedicated = {(each.samplers, each.ranks) for each in layouts(LOAD, 4, most_samplers=2) if each.kind == "dedicated"}
    assert dedicated == {(2, 1), (2, 2), (1, 3)}
    assert all(each.samplers <= 2 for each in layouts(LOAD, 4, most_samplers=2))

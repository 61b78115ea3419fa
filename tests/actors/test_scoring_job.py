"""The scoring job retries a passing fault unchanged, and narrows a lasting one down to its image."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ddpo.actors.rewards.backoff import backoff_seconds
from ray_ddpo.actors.rewards.reward import RewardMistake
from ray_ddpo.actors.rollouts.inquiry import MOST_TRIED, RewardFailed
from ray_ddpo.actors.rollouts.scoring_job import ScoringBatch, ScoringJob
from ray_ddpo.common.trajectory import Scores


def job(count: int = 8, batch_size: int = 4, attempts: int = 2) -> ScoringJob:
    return ScoringJob(("beauty",), count, batch_size, attempts)


def score(batch: ScoringBatch, **dropped: str) -> Scores:
    values = np.arange(batch.first, batch.last, dtype=np.float32)
    rows = {int(row.removeprefix("row")): reason for row, reason in dropped.items()}
    values[list(rows)] = np.nan
    return Scores({"beauty": values}, 0.5, rows)


def run(job: ScoringJob, bad: set[int]) -> list[tuple[int, int]]:
    """Score until all is done, while batches with a bad image fail. Return the batches in the order they were tried."""
    tried = []
    while not job.finished:
        batch = job.waiting.pop(0)
        if batch.inquiry:
            failed = not batch.of_control and batch.first in bad
            job.failed(batch, "it is bad") if failed else job.scored(batch, score(batch))
            continue
        tried.append((batch.first, batch.last))
        if bad & set(range(batch.first, batch.last)):
            job.failed(batch, "it is bad")
        else:
            assert job.scored(batch, score(batch))
    return tried


def run_until_broken(job: ScoringJob) -> None:
    while not job.broken:
        job.failed(job.waiting.pop(0), "it is bad")


def test_batches_are_cut_from_the_task_in_order() -> None:
    assert run(job(10, 4), set()) == [(0, 4), (4, 8), (8, 10)]


@given(st.integers(1, 9), st.integers(1, 5), st.sets(st.integers(0, 8)), st.sets(st.integers(0, 8)))
def test_a_row_without_an_image_is_given_to_no_reward(count: int, size: int, without: set[int], bad: set[int]) -> None:
    missing = {row: "no image" for row in without if row < count}
    whole = ScoringJob(("beauty",), count, size, 1, without_image=missing)
    whole.control.images = "an image that was scored before"
    asked = {row for batch in whole.waiting for row in range(batch.first, batch.last)}
    assert asked == set(range(count)) - missing.keys() and all(batch.size <= size for batch in whole.waiting)
    run(whole, bad - missing.keys())
    assert whole.scores().dropped == missing | {row: "it is bad" for row in asked & bad}


def test_an_inquiry_tries_no_row_without_an_image() -> None:
    whole = ScoringJob(("beauty",), 4, 2, 1, without_image={1: "no image", 3: "no image"})
    run_until_broken(whole)
    assert whole.broken and whole.broken.reasons.keys() == {0, 2}


def test_scores_stand_in_the_images_order_whatever_the_order_they_came_in() -> None:
    whole = job()
    first, second = whole.waiting
    for batch in (second, first):
        assert whole.scored(batch, score(batch))
    assert whole.scores().rewards["beauty"].tolist() == list(range(8)) and whole.scores().seconds == 1.0


def test_a_batch_that_fails_in_passing_is_scored_again_as_the_same_batch() -> None:
    whole = job(4, 4, attempts=3)
    for failures in (0, 1):
        batch = whole.waiting.pop(0)
        assert (batch.first, batch.last, batch.failures) == (0, 4, failures)
        whole.failed(batch, "the network is down")
    assert whole.scored(whole.waiting.pop(0), score(ScoringBatch(0, 4)))
    assert whole.finished and whole.scores().dropped == {}


def test_a_lasting_fault_is_halved_down_to_its_image_and_the_others_keep_scores() -> None:
    whole = job(4, 4, attempts=2)
    tried = run(whole, {2})
    # twice whole; the halves once each; the half with the fault halved; its image alone twice
    assert tried == [(0, 4), (0, 4), (0, 2), (2, 4), (2, 3), (2, 3), (3, 4)]
    scores = whole.scores()
    assert scores.dropped == {2: "it is bad"} and np.isnan(scores.rewards["beauty"][2])
    assert scores.rewards["beauty"][[0, 1, 3]].tolist() == [0, 1, 3]


def test_a_score_that_is_not_finite_is_retried_and_then_only_its_image_is_dropped() -> None:
    whole = job(4, 4, attempts=2)
    batch = whole.waiting.pop(0)
    assert not whole.scored(batch, score(batch, row1="nan"))
    assert not whole.finished
    again = whole.waiting.pop(0)
    assert again.failures == 1 and whole.scored(again, score(again, row1="nan"))
    assert whole.finished and whole.scores().dropped == {1: "nan"}


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 3), st.sets(st.integers(0, 19)))
def test_exactly_the_bad_images_are_dropped(count: int, batch_size: int, attempts: int, bad: set[int]) -> None:
    whole = job(count, batch_size, attempts)
    whole.control.images, whole.control.row = "of another task", 99
    run(whole, bad)
    assert set(whole.scores().dropped) == {image for image in bad if image < count} and not whole.broken
    assert np.isnan(whole.scores().rewards["beauty"]).sum() == len(whole.scores().dropped)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 3), st.booleans())
def test_where_no_image_passes_the_reward_is_broken_after_few_attempts(
    count: int, batch_size: int, attempts: int, scored_before: bool
) -> None:
    whole = job(count, batch_size, attempts)
    if scored_before:
        whole.control.images, whole.control.row = "of another task", 0
    tried = 0
    while not whole.broken:
        whole.failed(whole.waiting.pop(0), "it is bad", "its trace")
        tried += 1
    assert tried <= attempts + 2 * MOST_TRIED + 1
    error = whole.broken.error("round 0, task 1")
    assert isinstance(error, RewardFailed if scored_before else RewardMistake)
    assert re.search(r"it is bad; so it does for every image that was tried \(\d+ of round 0, task 1", str(error))
    assert str(error).endswith("\nthe reward's traceback:\nits trace")


def test_a_batch_of_bad_images_is_dropped_if_the_control_image_passes() -> None:
    whole = job(4, 4, attempts=1)
    whole.control.images, whole.control.row = "of another task", 3
    whole.failed(whole.waiting.pop(0), "it is bad")
    for row in range(4):
        assert whole.waiting[0].first == row and whole.waiting[0].pause_seconds == 0
        whole.failed(whole.waiting.pop(0), f"{row} is bad")
    control = whole.waiting.pop(0)
    assert whole.images_of(control) == "of another task" and (control.first, control.last) == (3, 4)
    assert whole.scored(control, score(ScoringBatch(0, 1)))
    assert whole.finished and whole.scores().dropped == {row: f"{row} is bad" for row in range(4)}


def test_only_another_attempt_at_the_same_images_waits() -> None:
    whole = job(8, 8, attempts=3)
    pauses = []
    while not whole.finished:
        batch = whole.waiting.pop(0)
        pauses.append((batch.first, batch.last, batch.pause_seconds))
        if batch.first <= 5 < batch.last:
            whole.failed(batch, "it is bad")
        else:
            whole.scored(batch, score(batch))
    assert pauses[:4] == [(0, 8, 0), (0, 8, 0.5), (0, 8, 1), (0, 1, 0)]  # the last passes: not all are bad
    assert sum(seconds for *_, seconds in pauses[4:]) == 1.5 and pauses[4][:2] == (0, 4)


def deadly(job: ScoringJob, killers: set[int]) -> list[tuple[int, int]]:
    """Score until all is done, while workers die over killer images. Return the batches over which workers died."""
    died = []
    while not job.finished:
        batch = job.waiting.pop(0)
        found = sorted(killers & set(range(batch.first, batch.last)))
        if found:
            died.append((batch.first, batch.last))
            job.lost(batch, to_blame=True, row=found[0] if batch.one_by_one else None)
        else:
            job.scored(batch, score(batch))
    return died


@given(st.integers(1, 20), st.integers(1, 8), st.sets(st.integers(0, 19)))
def test_images_that_kill_their_worker_are_found_by_four_deaths_each_and_dropped(
    count: int, batch_size: int, killers: set[int]
) -> None:
    whole = job(count, batch_size)
    deaths = deadly(whole, killers)
    scores, expected = whole.scores(), {image for image in killers if image < count}
    assert set(scores.dropped) == expected and len(deaths) == 4 * len(expected)
    assert all("died, 2 times over it alone" in reason for reason in scores.dropped.values())
    others = [image for image in range(count) if image not in expected]
    assert scores.rewards["beauty"][others].tolist() == others


def test_deaths_by_chance_change_neither_batches_nor_scores() -> None:
    whole = job(4, 4)
    for _ in range(20):  # while it only waited behind another batch
        whole.lost(whole.waiting.pop(0))
    for _ in range(2):
        whole.lost(whole.waiting.pop(0), to_blame=True)
    one_by_one = whole.waiting.pop(0)
    assert one_by_one.one_by_one and whole.scored(one_by_one, score(one_by_one))
    again = whole.waiting.pop(0)
    assert (again.first, again.last, again.one_by_one) == (0, 4, False)
    whole.lost(again, to_blame=True)
    assert run(whole, set()) == [(0, 4)] and whole.scores().dropped == {}


def test_a_batch_that_kills_workers_though_no_image_does_is_halved() -> None:
    whole = job(4, 4)
    died = []
    while not whole.finished:
        batch = whole.waiting.pop(0)
        if batch.size > 2 and not batch.one_by_one:  # more than fits
            died.append(batch)
            whole.lost(batch, to_blame=True)
        else:
            whole.scored(batch, score(batch))
    assert len(died) == 4 and whole.scores().dropped == {}


@pytest.mark.parametrize(("failures", "seconds"), [(0, 0), (1, 0.5), (2, 1), (3, 2), (20, 30)])
def test_each_attempt_waits_longer_up_to_a_limit(failures: int, seconds: float) -> None:
    assert backoff_seconds(failures) == seconds


def test_costs_are_summed_over_batches_also_those_of_scores_that_are_discarded() -> None:
    half = job(count=4, batch_size=2)
    half.failed(half.waiting.pop(0), "it is bad")
    half.failed(half.waiting.pop(0), "it is bad")  # as often as a batch is attempted
    alone = half.waiting.pop(0)
    assert alone.inquiry, "its score is discarded"
    half.scored(alone, replace(score(alone), usage={"judge/requests": 1.0}))
    for count in (1, 1, 2):
        batch = half.waiting.pop(0)
        assert batch.size == count
        half.scored(batch, replace(score(batch), usage={"judge/requests": 2.0}))
    assert half.scores().usage == {"judge/requests": 7.0}

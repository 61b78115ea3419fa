"""The scoring job: a passing fault is tried again whole, a lasting one is narrowed down to its picture, a death is nobody's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.scoring_job import ScoringBatch, ScoringJob, backoff_seconds
from common.trajectory import Scores


def job(count: int = 8, batch_size: int = 4, attempts: int = 2) -> ScoringJob:
    return ScoringJob(("beauty",), count, batch_size, attempts)


def score(batch: ScoringBatch, **set_aside: str) -> Scores:
    values = np.arange(batch.first, batch.last, dtype=np.float32)
    rows = {int(row.removeprefix("row")): reason for row, reason in set_aside.items()}
    values[list(rows)] = np.nan
    return Scores({"beauty": values}, 0.5, rows)


def run(job: ScoringJob, bad: set[int]) -> list[tuple[int, int]]:
    """Score until all is done; a batch with a bad picture fails. The batches in the order they were tried."""
    tried = []
    while not job.finished:
        batch = job.waiting.pop(0)
        tried.append((batch.first, batch.last))
        if bad & set(range(batch.first, batch.last)):
            job.failed(batch, "it is bad")
        else:
            assert job.scored(batch, score(batch))
    return tried


def test_batches_are_cut_from_the_task_in_order() -> None:
    assert run(job(10, 4), set()) == [(0, 4), (4, 8), (8, 10)]


def test_scores_stand_in_the_pictures_order_whatever_the_order_they_came_in() -> None:
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
    assert whole.finished and whole.scores().set_aside == {}


def test_a_lasting_fault_is_halved_down_to_its_picture_and_the_others_keep_their_scores() -> None:
    whole = job(4, 4, attempts=2)
    tried = run(whole, {2})
    # twice whole; the halves once each; the half with the fault halved; its picture alone twice
    assert tried == [(0, 4), (0, 4), (0, 2), (2, 4), (2, 3), (2, 3), (3, 4)]
    scores = whole.scores()
    assert scores.set_aside == {2: "it is bad"} and np.isnan(scores.rewards["beauty"][2])
    assert scores.rewards["beauty"][[0, 1, 3]].tolist() == [0, 1, 3]


def test_where_every_picture_fails_all_are_set_aside_and_none_is_scored_0() -> None:
    whole = job(3, 4, attempts=1)
    run(whole, {0, 1, 2})
    assert list(whole.scores().set_aside) == [0, 1, 2] and np.isnan(whole.scores().rewards["beauty"]).all()


def test_an_answer_that_is_not_finite_is_asked_for_again_and_then_only_its_picture_is_set_aside() -> None:
    whole = job(4, 4, attempts=2)
    batch = whole.waiting.pop(0)
    assert not whole.scored(batch, score(batch, row1="nan"))
    assert not whole.finished
    again = whole.waiting.pop(0)
    assert again.failures == 1 and whole.scored(again, score(again, row1="nan"))
    assert whole.finished and whole.scores().set_aside == {1: "nan"}


def test_a_death_is_never_counted_against_the_reward() -> None:
    whole = job(4, 4, attempts=2)
    for _ in range(10):
        whole.lost(whole.waiting.pop(0))
    assert whole.waiting == [ScoringBatch(0, 4, 0)]


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 3), st.sets(st.integers(0, 19)))
def test_exactly_the_bad_pictures_are_set_aside(count: int, batch_size: int, attempts: int, bad: set[int]) -> None:
    whole = job(count, batch_size, attempts)
    run(whole, bad)
    assert set(whole.scores().set_aside) == {picture for picture in bad if picture < count}
    assert np.isnan(whole.scores().rewards["beauty"]).sum() == len(whole.scores().set_aside)


@pytest.mark.parametrize(("failures", "seconds"), [(0, 0), (1, 0.5), (2, 1), (3, 2), (20, 30)])
def test_each_attempt_waits_longer_up_to_a_limit(failures: int, seconds: float) -> None:
    assert backoff_seconds(failures) == seconds

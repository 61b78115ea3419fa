"""The ideal round of the overlap benchmark by hand, and stand-ins with the real actors' interface."""

import inspect

import pytest

from benchmarks.overlap import PROPORTIONS, WORKERS, model_row, pairs
from benchmarks.stand_in_run import DeviceTime, Proportion, device_time, ideal_seconds
from benchmarks.stand_ins import StandInLearner, StandInRewardWorker, StandInSampler
from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.learner.learner import Learner


def test_without_lag_one_side_waits_for_the_other() -> None:
    assert ideal_seconds((2.0, 0.5, 1.0), 0.1, 0) == pytest.approx(3.1)


@pytest.mark.parametrize(
    ("sides", "lag", "seconds"),
    [
        ((4.0, 0.5, 1.0), 1, 4.0),
        ((1.0, 4.0, 1.0), 1, 4.0),
        ((1.0, 0.5, 4.0), 1, 4.0),
        ((2.0, 0.5, 2.0), 1, 2.05),  # a round's way through all is 4.1 s, and two are under way
        ((2.0, 0.5, 2.0), 2, 2.0),
    ],
)
def test_with_lag_the_slowest_side_or_the_latency_decides(
    sides: tuple[float, float, float], lag: int, seconds: float
) -> None:
    assert ideal_seconds(sides, 0.1, lag) == pytest.approx(seconds)


def test_tasks_are_indivisible() -> None:
    assert Proportion("", samplers=4, reward_workers=1, tasks=9, sample=0.5, score=0, update=0).sampling == 1.5


@pytest.mark.parametrize(
    ("reward_workers", "score", "tail"),
    [
        (2, 0.1, 0.1),  # of the last two tasks, at once
        (1, 0.1, 0.2),  # of the last two tasks, in turn
        (1, 1.0, 3.0),  # at 1, 2, 3, 4 s; sampled after 1 s: 1 + 4 × 1 − 2
    ],
)
def test_remaining_scoring_after_the_last_task_is_sampled(reward_workers: int, score: float, tail: float) -> None:
    proportion = Proportion("", 2, reward_workers, tasks=4, sample=1.0, score=score, update=0)
    assert proportion.tail == pytest.approx(tail)


def test_each_side_and_the_latency_decide_in_some_setting() -> None:
    deciding = set()
    for proportion in PROPORTIONS:
        sides = {"sampling": proportion.sampling, "scoring": proportion.scoring, "learning": proportion.update}
        ideal = proportion.ideal(1)
        deciding.add(next((side for side, seconds in sides.items() if seconds == ideal), "the way through all"))
    assert deciding == {"sampling", "scoring", "learning", "the way through all"}


def test_a_devices_time_is_what_its_two_processes_worked_within_the_window() -> None:
    sampling, learning = [(0.0, 2.0), (2.5, 4.0), (9.0, 11.0)], [(3.0, 8.0)]
    # Of 1 s to 11 s: 1 + 1.5 + 2 s, and 5 s, of which 1 s beside the sampler.
    assert device_time(sampling, learning, (1.0, 11.0)) == DeviceTime(0.45, 0.5, 0.1)
    assert device_time(sampling, learning, (1.0, 11.0)).busy == pytest.approx(0.85)
    assert device_time([], [(20.0, 30.0)], (1.0, 11.0)) == DeviceTime(0, 0, 0)


@pytest.mark.parametrize("devices", WORKERS)
def test_devices_shared_in_turns_can_ideally_be_busy_for_nine_tenths_of_a_round(devices: int) -> None:
    proportion = pairs(devices)
    assert proportion.ideal(0) == pytest.approx(2.0 + 0.1 + 4.26)  # two tasks in turn per reward worker at the end
    assert (proportion.sampling + proportion.update) / proportion.ideal(0) > 0.98


def test_the_models_row_excludes_rounds_without_overlap() -> None:
    metrics = [
        {"seconds/sample": 2.0, "seconds/score": 0.2, "seconds/learn": 1.0, "seconds/round": seconds}
        for seconds in (9.0, 9.0, 2.0, 2.4, 9.0)
    ]
    assert model_row(1, metrics) == "| 1 | 2.00 | 0.200 | 1.00 | 2.00 s | 2.20 s | 1.100 |"


@pytest.mark.parametrize(
    ("stand_in", "real", "methods"),
    [
        (StandInSampler, Sampler, ("ready", "stacks", "sleep", "forget", "sample")),
        (StandInRewardWorker, RewardWorker, ("ready", "stacks", "score")),
        (StandInLearner, Learner, ("join", "stacks", "sleep", "weights", "state", "load_state")),
        (StandInLearner, Learner, ("begin", "lead", "follow")),
    ],
)
def test_a_stand_in_has_the_real_actors_signature(stand_in: type, real: type, methods: tuple[str, ...]) -> None:
    for method in methods:
        ours, theirs = (inspect.signature(getattr(each, method)).parameters for each in (stand_in, real))
        # Ray adds a parameter of its own to the methods of a class that was made an actor in this process.
        assert [name for name in ours if not name.startswith("_ray")] == [
            name for name in theirs if not name.startswith("_ray")
        ], method

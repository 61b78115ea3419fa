"""MFU by hand."""

import numpy as np
import pytest

from ray_ddpo.common.machine import Machine
from ray_ddpo.common.metrics.mfu import mfu_metrics
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.schedule import Task
from ray_ddpo.common.trajectory import Rollout, Scores, TaskReport


def rollout(index: int, seconds: float, rate: float | None) -> Rollout:
    task = Task(7, index, 6, (Prompt("cat"), Prompt("dog")), (1, 2))
    machine = None if rate is None else Machine(processor="a", matrix_rate=rate)
    report = TaskReport(task, "", 0, 0, seconds, machine=machine)
    return Rollout(report, Scores({"reward": np.zeros(2, np.float32)}, 0.1), None, None)


def test_each_sampler_is_compared_with_its_own_rate() -> None:
    # 2 images of 30 operations each in 2 s at 100 a second, and in 1 s at 400 a second: 120 of 600.
    found = mfu_metrics([rollout(0, 2.0, 100.0), rollout(1, 1.0, 400.0)], 0, (30.0, 0.0), 1.0, (0.0, 1))
    assert found == {"mfu/sampler": pytest.approx(0.2)}


def test_the_learners_seconds_count_for_every_rank_and_dropped_images_are_not_learned_from() -> None:
    # 3 of 4 images of 80 operations, in 2 s on 3 ranks at 100 a second: 240 of 600.
    found = mfu_metrics([rollout(0, 2.0, None), rollout(1, 1.0, None)], 1, (30.0, 80.0), 2.0, (100.0, 3))
    assert found == {"mfu/learner": pytest.approx(0.4)}


def test_without_rates_there_is_no_metric() -> None:
    assert mfu_metrics([rollout(0, 2.0, 0.0)], 0, (30.0, 80.0), 2.0, (0.0, 1)) == {}


def test_a_rate_does_not_make_another_machine() -> None:
    assert Machine(processor="a", matrix_rate=1.0) == Machine(processor="a", matrix_rate=2.0)
    assert str(Machine(processor="a", matrix_rate=1.0)) == "a"

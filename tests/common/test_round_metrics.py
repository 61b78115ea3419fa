"""A round's metrics from reports with numbers worked out by hand."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.metrics.round_metrics import Memory, RoundClock, StreamReport, memory_now, round_metrics
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.schedule import Task
from ray_ddpo.common.trajectory import Rollout, Scores, TaskReport

# A round of 10 s, of which 6 were spent waiting for its rollouts. Two samplers, one of which came for its last 2 s.
CLOCK = RoundClock(started=100.0, collected=106.0, learned=110.0)
LEARNED = {"loss": 0.5, "seconds/learn": 3.0}
MEMORY = Memory(driver_rss=400, weights=24)


def stream(**changes: object) -> StreamReport:
    fields = {
        "samplers_alive": 2,
        "samplers_desired": 3,
        "reward_workers_alive": 1,
        "sampler_seconds": 12.0,
        "reward_worker_seconds": 10.0,
        "tasks_inflight": 4,
        "tasks_ready": 1,
        "retries": {},
        "restarts": {},
    }
    return StreamReport(**{**fields, **changes})


def rollout(index: int, policy_version: int, sampling: float, scoring: float) -> Rollout:
    task = Task(7, index, policy_version, (Prompt("cat"), Prompt("dog")), (1, 2))
    report = TaskReport(task, "", 0, 0, sampling)
    return Rollout(report, Scores({"reward": np.zeros(2, np.float32)}, scoring), None, None)


ROLLOUTS = [rollout(0, 6, sampling=5.0, scoring=0.5), rollout(1, 6, sampling=4.0, scoring=2.0)]


def metrics_with(memory: Memory = MEMORY, **changes: object) -> dict[str, float]:
    return round_metrics(7, ROLLOUTS, LEARNED, CLOCK, stream(**changes), memory)


def test_seconds_are_summed_over_tasks_and_read_off_the_clock() -> None:
    metrics = metrics_with()
    names = ("seconds/sample", "seconds/score", "seconds/learn", "seconds/wait", "seconds/round")
    assert [metrics[name] for name in names] == [9.0, 2.5, 3.0, 6.0, 10.0]
    assert metrics["images_per_second"] == 0.4  # 4 images in 10 s
    assert (metrics["round"], metrics["policy_version"], metrics["lag/max"]) == (7, 8, 1)
    assert metrics["loss"] == 0.5


def test_idle_is_the_share_of_the_time_that_a_role_was_there_and_did_nothing() -> None:
    metrics = metrics_with()
    assert metrics["idle/sampler"] == pytest.approx(1 - 9 / 12)
    assert metrics["idle/reward_worker"] == pytest.approx(1 - 2.5 / 10)
    assert metrics["idle/learner"] == pytest.approx(1 - 3 / 10)


def test_a_round_sampled_before_it_began_has_no_negative_idle_time() -> None:
    assert metrics_with(sampler_seconds=6.0)["idle/sampler"] == 0


def test_without_workers_idle_is_nan() -> None:
    assert math.isnan(metrics_with(sampler_seconds=0.0)["idle/sampler"])


def test_workers_and_tasks_are_counted() -> None:
    metrics = metrics_with()
    names = ("samplers/alive", "samplers/desired", "reward_workers/alive", "tasks/inflight", "tasks/ready")
    assert [metrics[name] for name in names] == [2, 3, 1, 4, 1]


def test_retries_have_their_reason_and_restarts_their_role() -> None:
    metrics = metrics_with(retries={"timeout": 2, "died": 1}, restarts={"sampler": 3})
    found = {name: value for name, value in metrics.items() if name.startswith(("retries/", "actor_restarts/"))}
    assert found == {"retries/timeout": 2, "retries/died": 1, "actor_restarts/sampler": 3}


def test_memory_is_in_bytes() -> None:
    metrics = metrics_with()
    assert (metrics["driver/rss_bytes"], metrics["weight_bytes"]) == (400, 24)


def test_the_drivers_memory_is_what_the_kernel_says_of_this_process() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert memory_now(24).driver_rss == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.05)
    assert memory_now(24).weights == 24


def test_every_metric_is_a_float() -> None:
    assert {type(value) for value in metrics_with(retries={"timeout": 2}, restarts={"learner": 1}).values()} == {float}

"""The scale benchmark's arithmetic by hand, and stand-ins with the real actors' interface."""

import dataclasses
import inspect

import numpy as np
import pytest

from benchmarks.scale_fit import Cost, Measured, costs_table, fitted, least_squares, on_paper, table
from benchmarks.scale_run import LearnerStandIn
from benchmarks.scale_stand_ins import SamplerHost, ScorerStandIn, Setting
from benchmarks.stand_in_records import Sampled, Scored
from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.trajectory import Scores, TaskReport
from ray_ddpo.learner.learner import Learner


def test_sizes_of_a_setting_by_hand() -> None:
    setting = Setting(images=64, images_per_task=8, steps=10, pixels=64, samplers=4, busy_seconds=2.0)
    assert setting.tasks == 8
    assert setting.trajectory_bytes == 11 * 4 * 8 * 8 * 2 and setting.image_bytes == 3 * 64 * 64
    assert setting.task_seconds(0) == setting.task_seconds(1) == 1.0  # two tasks for each of four samplers in 2 s


def test_uneven_samplers_have_the_same_total_speed() -> None:
    setting = Setting(images=64, images_per_task=8, samplers=4, busy_seconds=2.0, uneven=True)
    tasks_a_second = [1 / setting.task_seconds(sampler) for sampler in range(4)]
    assert tasks_a_second[0] == 2 * tasks_a_second[1] and sum(tasks_a_second) == pytest.approx(4.0)
    assert setting.sampling_seconds == pytest.approx(2.0)
    assert dataclasses.replace(setting, samplers=1).sampling_seconds == pytest.approx(1.5)  # the fast one alone


def test_lines_through_exact_points_are_found() -> None:
    sizes = np.array([[1, 10], [1, 100], [1, 1000]], float)
    assert least_squares(sizes, sizes @ [3.0, 0.5]) == pytest.approx([3.0, 0.5])


def test_a_cost_is_never_negative() -> None:
    sizes = np.array([[1, 10], [1, 20]], float)
    # The line through both points is 20 − x. Its slope is negative, so x is dropped and the rest fitted by shares.
    first, second = least_squares(sizes, np.array([10.0, 0.0]) + [0.0, 1e-6])
    assert second == 0 and first >= 0


def measured(axis: str, setting: Setting) -> Measured:
    """Return a measurement of 2 ms a task, 1 ms a sampler and 0.01 MB an image."""
    cost = 2e-3 * setting.tasks + 1e-3 * setting.samplers
    return Measured(axis, setting, Cost(1.0, cost, cost, 1e-3 * setting.tasks, 0.01 * setting.images, 0.0))


FOUND = [
    *(measured("images", Setting(images=images)) for images in (64, 512, 4096)),
    *(measured("images_per_task", Setting(images=64 * size, images_per_task=size)) for size in (1, 16)),
    *(measured("samplers", Setting(samplers=samplers)) for samplers in (1, 64)),
    measured("steps", Setting(steps=50)),
]


def test_costs_are_separated_and_extrapolated() -> None:
    costs = fitted(FOUND)
    driver = costs["driver_cpu"]
    assert driver["task"] == pytest.approx(2e-3) and driver["sampler"] == pytest.approx(1e-3)
    assert driver["image"] == pytest.approx(0, abs=1e-6)
    assert costs["driver_peak"]["image"] == pytest.approx(0.01)
    paper = on_paper(costs, Setting(1_000_000, 8, samplers=10_000))
    assert driver["task and further rank"] == 0  # all of these settings have one rank
    assert paper["driver_cpu"] == pytest.approx(250 + 10) and paper["driver_peak"] == pytest.approx(10_000)


def test_tables_have_one_line_per_measurement() -> None:
    assert "| samplers | 64 | 64 | 1.00 | 0.192 | 3,000 | 0.06 | 5 | 0 |" in table(FOUND)
    assert "| task | 2,000.0 µs | 1,000.0 µs |" in costs_table(fitted(FOUND))


@pytest.mark.parametrize(
    ("stand_in", "real", "methods"),
    [
        (SamplerHost, Sampler, ("ready", "stacks", "forget", "sample")),
        (ScorerStandIn, RewardWorker, ("ready", "stacks", "score", "score_together")),
        (LearnerStandIn, Learner, ("ready", "stacks", "join", "weights", "state", "lead", "follow")),
    ],
)
def test_a_stand_in_has_the_real_actors_signature(stand_in: type, real: type, methods: tuple[str, ...]) -> None:
    for method in methods:
        ours, theirs = (inspect.signature(getattr(each, method)).parameters for each in (stand_in, real))
        # Ray adds a parameter to an actor's methods; a host's methods take the sampler's number first.
        assert [name for name in ours if not name.startswith("_ray") and name != "sampler"] == [
            name for name in theirs if not name.startswith("_ray")
        ], method


@pytest.mark.parametrize(("stand_in", "real"), [(Sampled, TaskReport), (Scored, Scores)])
def test_a_stand_ins_answer_has_the_real_fields(stand_in: type, real: type) -> None:
    assert [field.name for field in dataclasses.fields(stand_in)] == [field.name for field in dataclasses.fields(real)]

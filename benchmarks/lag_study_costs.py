"""Measure what each correction adds to a round's update: the same round under each correction, in one process."""

import dataclasses
import json
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.study import StudyRun
from benchmarks.timing import machine, seconds
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import TrainBatch, Trajectory
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.learner import Learner

REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Lagging:
    """A learner one version ahead of the round that it is about to train on."""

    learner: Learner
    state: LearnerState
    batch: TrainBatch
    trajectories: tuple[Trajectory, ...]

    def update_seconds(self) -> float:
        """Time the round's update, always from the same state."""
        self.learner.load_state(self.state)
        return seconds(lambda: self.learner.update(self.batch, *self.trajectories))


def sampled_round(
    sampler: Sampler, learner: Learner, recipe: Recipe, round_index: int
) -> tuple[TrainBatch, tuple[Trajectory, ...]]:
    """Sample a round with the oldest version that the learner keeps. Its advantages are random."""
    weights = learner.weights()[0]
    tasks = round_tasks(recipe, round_index, build_components(recipe).prompts.load())
    sampled = [sampler.sample(task, weights)[:2] for task in tasks]
    advantages = np.random.default_rng(round_index).standard_normal(recipe.images_per_round)
    return TrainBatch(round_index, tuple(report for report, _ in sampled), advantages), tuple(
        path for _, path in sampled
    )


def lagging(run: StudyRun) -> Lagging:
    """Return a learner after one update at lag 1, with the next round sampled for it."""
    components = build_components(Recipe.load(run.recipe, list(run.overrides)))
    recipe = components.recipe
    sampler = Sampler(components.policy, recipe.sampling, recipe.runtime)
    learner = Learner(components.policy, components.algorithm, recipe)
    batch, trajectories = sampled_round(sampler, learner, recipe, 0)
    _, state = learner.update(batch, *trajectories)
    return Lagging(learner, state, *sampled_round(sampler, learner, recipe, 1))


def measure(runs: dict[str, StudyRun], path: Path) -> dict[str, float]:
    """Return update times relative to the plain one, medians of interleaved repeats. Write them to `path`."""
    prepared = {name: lagging(run) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, each in prepared.items():
            time = each.update_seconds()
            if repeat:  # the first repeat is a warm-up
                taken[name].append(time)
    costs = {name: round(median(times) / median(taken["plain"]), 3) for name, times in taken.items()}
    path.write_text(json.dumps({"update over the plain one": costs, "machine": machine()}, indent=1) + "\n")
    return costs


def read_costs(path: Path) -> dict[str, float]:
    """Return the relative costs by correction. Corrections without an extra pass are absent."""
    return json.loads(path.read_text())["update over the plain one"] if path.exists() else {}

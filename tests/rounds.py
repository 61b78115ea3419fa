"""Rounds sampled on the tiny pipeline with fixed advantages, for tests of the learner."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.policy_weights import PolicyWeights, pack
from ray_ddpo.common.recipe.overrides import with_overrides
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import TaskReport, TrainBatch, Trajectory
from ray_ddpo.deploy.driver.components import Components, build_components
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.process_group import ProcessGroup


@dataclass(frozen=True)
class SampledRound:
    """A round as the learner receives it."""

    batch: TrainBatch
    trajectories: tuple[Trajectory, ...]

    def with_reports(self, **changes: Any) -> TrainBatch:
        """Return the batch with every report changed."""
        reports = tuple(dataclasses.replace(report, **changes) for report in self.batch.reports)
        return dataclasses.replace(self.batch, reports=reports)


def components_with(tables: dict, **values: Any) -> Components:
    """Return the recipe's components after overrides such as learner__batch_size=2."""
    overrides = [(f"--{key.replace('__', '.')}", str(value)) for key, value in values.items()]
    return build_components(Recipe.parse(with_overrides(tables, [word for pair in overrides for word in pair])))


def learner_of(components: Components, ranks: ProcessGroup | None = None) -> Learner:
    """Return a learner with non-zero adapters, still at version 0."""
    learner = Learner(components.policy, components.algorithm, components.recipe, ranks)
    learner.load_state(LearnerState(0, (moved(learner.weights()[-1]),), {}, {}))
    return learner


def moved(weights: PolicyWeights, seed: int = 1) -> PolicyWeights:
    """Return the weights with noise on every number. A fresh adapter has no gradient in half of its matrices."""
    generator = np.random.default_rng(seed)
    arrays = {
        name: array + 0.05 * generator.standard_normal(array.shape, np.float32)
        for name, array in weights.arrays().items()
    }
    return pack(weights.policy_version, arrays)


_samplers: dict[tuple[object, ...], Sampler] = {}


def sampler_of(components: Components) -> Sampler:
    """Return a sampler, the same one for all tests with equal keys: loading takes longer than sampling tiny images."""
    keys = (components.policy, components.recipe.sampling, components.recipe.runtime)
    key = (type(components.policy), *(each.model_dump_json() for each in keys))
    if key not in _samplers:
        _samplers[key] = Sampler(*keys)
    return _samplers[key]


def sample_round(components: Components, weights: PolicyWeights, round_index: int = 0) -> SampledRound:
    """Sample a round's tasks. Its advantages are normal noise, except for two extreme ones at the start."""
    sampler = sampler_of(components)
    sampled = [
        sampler.sample(task, weights)[:2]
        for task in round_tasks(components.recipe, round_index, components.prompts.load())
    ]
    advantages = np.random.default_rng(round_index).standard_normal(components.recipe.images_per_round)
    advantages[:2] = 7.0, -6.0
    reports: tuple[TaskReport, ...] = tuple(report for report, _ in sampled)
    return SampledRound(TrainBatch(round_index, reports, advantages), tuple(trajectory for _, trajectory in sampled))


def stale(sampled: SampledRound, shifts: list[float], seed: int = 0) -> SampledRound:
    """Return the round with every old log-prob moved by a random element of `shifts`, as after policy updates."""
    generator = torch.Generator().manual_seed(seed)
    trajectories = []
    for trajectory in sampled.trajectories:
        chosen = torch.randint(len(shifts), trajectory.log_probs.shape, generator=generator)
        log_probs = trajectory.log_probs + torch.tensor(shifts)[chosen]
        trajectories.append(dataclasses.replace(trajectory, log_probs=log_probs))
    return SampledRound(sampled.batch, tuple(trajectories))


def begun_run(tables: dict) -> RunFolder:
    """Create the folder of a run with a recipe and no round yet, for one to four samplers."""
    components = components_with({**tables, "samplers": {"count": 1, "max": 4}})
    folder = RunFolder(components.recipe.run_path())
    folder.create()
    folder.write_recipe(components.resolved())
    return folder

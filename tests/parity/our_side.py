"""Our side of the comparison with TRL: sample, score and train on the same rounds, with the same names of results."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks, transition_order
from ray_ddpo.common.trajectory import Rollout, Scores, Trajectory
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.algorithms.ddpo_is import DDPOImportanceSampling
from ray_ddpo.learner.algorithms.reward_aggregation import RewardAggregation
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.round_data.round_buffer import RoundBuffer

Seen = dict[str, np.ndarray]  # "round0/latents" and so on: an array's first axes are image and step


def prompted(tables: dict, folder: Path, *prompts: str) -> dict:
    """Return the recipe's tables with these prompts."""
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    return {**tables, "prompts": {"name": "file", "path": str(folder / "prompts.txt")}}


def rewards_of(recipe: Recipe) -> list[np.ndarray]:
    """Return rewards for each round's images, independent of the images: numbers like JPEG sizes in kilobytes."""
    generator, shape = np.random.default_rng(recipe.seed), (recipe.rounds, recipe.images_per_round)
    return list(generator.normal(-5, 2, shape).astype(np.float32))


def described(components: Components, rewards: list[np.ndarray]) -> list[dict[str, Any]]:
    """Return each round's prompts, seeds, rewards and training order, as input for TRL."""
    rounds, recipe = [], components.recipe
    for index in range(recipe.rounds):
        tasks = round_tasks(recipe, index, components.prompts.load())
        epochs = range(recipe.learner.inner_epochs)
        orders = [transition_order(recipe.seed, index, epoch, recipe.images_per_round) for epoch in epochs]
        rounds.append(
            {
                "prompts": [prompt.text for task in tasks for prompt in task.prompts],
                "seeds": [seed for task in tasks for seed in task.seeds],
                "rewards": rewards[index].tolist(),
                "orders": [order.tolist() for order in orders],
            }
        )
    return rounds


class Watched:
    """Runs the rounds of a recipe in this process and keeps what goes through."""

    def __init__(self, components: Components, learner: Learner) -> None:
        self._components, self._recipe, self._learner = components, components.recipe, learner
        self._sampler = Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)
        self._buffer = RoundBuffer(components.algorithm, RewardAggregation({"given": 1.0}))
        self._prefix = ""
        self.seen: Seen = {}

    def run(self, rewards: list[np.ndarray]) -> Seen:
        for index in range(self._recipe.rounds):
            self._prefix = f"round{index}"
            self._round(index, rewards[index])
        return self.seen

    def _note(self, name: str, value: Any) -> None:
        self.seen[f"{self._prefix}/{name}"] = np.array(value)

    def _round(self, index: int, rewards: np.ndarray) -> None:
        weights, rollouts = self._learner.weights()[-1], []
        tasks = round_tasks(self._recipe, index, self._components.prompts.load())
        for task, of_task in zip(tasks, np.split(rewards, len(tasks)), strict=True):
            report, trajectory, images = self._sampler.sample(task, weights)
            rollouts.append(Rollout(report, Scores({"given": of_task.astype(np.float64)}, 0.0), trajectory, images))
        trajectories = [rollout.trajectory for rollout in rollouts]
        paths = [torch.cat([one.latents, one.next_latents[:, -1:]], dim=1) for one in trajectories]
        self._note("latents", torch.cat(paths))
        self._note("log_probs", torch.cat([one.log_probs for one in trajectories]))
        self._note("images", np.concatenate([rollout.images.pixels for rollout in rollouts]))
        batch = self._buffer.train_batch(rollouts)
        self._note("advantages", batch.advantages)
        with self._pairs_watched(trajectories), self._optimizer_steps_watched(weights):
            self._learner.update(batch, *trajectories)

    @contextmanager
    def _pairs_watched(self, trajectories: list[Trajectory]) -> Iterator[None]:
        """Return loss and ratio of every transition, found by its step and its latents."""
        entering = torch.cat([one.latents for one in trajectories])  # of all steps
        shape = (self._recipe.learner.inner_epochs, *entering.shape[:2])
        losses, ratios, pairs = np.full(shape, np.nan), np.full(shape, np.nan), itertools.count()
        own = DDPOImportanceSampling.compute_loss

        def watched(algorithm: Any, policy: Any, batch: Any) -> TransitionLoss:
            result = own(algorithm, policy, batch)
            if torch.is_grad_enabled():  # not the measurement of the divergence
                for row, step in enumerate(batch.steps.tolist()):
                    same = (entering[:, step] == batch.latents[row]).flatten(1).all(1)
                    (image,) = same.nonzero().flatten().tolist()
                    place = (next(pairs) // (shape[1] * shape[2]), image, step)
                    losses[place], ratios[place] = result.loss[row].detach(), result.log_ratio[row].exp()
            return result

        with patch.object(DDPOImportanceSampling, "compute_loss", watched):
            yield
        self._note("losses", losses)
        self._note("ratios", ratios)

    @contextmanager
    def _optimizer_steps_watched(self, weights: PolicyWeights) -> Iterator[None]:
        """Record each optimizer step's gradient after clipping, and the adapters after the step."""
        names, begun, ended = list(weights.arrays()), itertools.count(), itertools.count()

        def note(name: str, tensors: list[torch.Tensor]) -> None:
            for parameter, tensor in zip(names, tensors, strict=True):
                self._note(f"{name}/{parameter}", tensor.detach())

        def before(optimizer: Any, *_: Any) -> None:
            gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
            note(f"step{next(begun)}/gradient", gradients)

        def after(optimizer: Any, *_: Any) -> None:
            note(f"step{next(ended)}/weights", optimizer.param_groups[0]["params"])

        handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

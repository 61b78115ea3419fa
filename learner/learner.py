"""Learner: owns policy and optimizer; turns a round's trajectories and advantages into new weights and metrics."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import Recipe
from common.diffusion.lora import load_weights, read_weights, trained_parameters
from common.diffusion.policy import PolicyConfig
from common.lora_weights import LoraWeights
from common.runtime import settle
from common.schedule import transition_order
from common.trajectory import TaskReport, TrainBatch, Trajectory
from learner.algorithms.algorithm import Algorithm
from learner.round_transitions import RoundTransitions, micro_batches, round_transitions
from learner.update_metrics import UpdateMetrics


@dataclass(frozen=True)
class LearnerState:
    """All that the learner needs to go on to the last bit."""

    policy_version: int
    weights: tuple[LoraWeights, ...]  # of the last max_policy_lag + 1 versions, the newest last
    optimizer: dict[str, np.ndarray]  # "<parameter>/<AdamW's own key>"
    scaler: dict[str, int | float]  # of float16's gradient scaler; empty otherwise


class Learner:
    """One process, one device. `update` is a pure function of its state, the batch and the trajectories."""

    def __init__(self, policy: PolicyConfig, algorithm: Algorithm, recipe: Recipe) -> None:
        self._device = settle(recipe.runtime)
        self._recipe = recipe
        self._settings = recipe.learner
        self._algorithm = algorithm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # the adapters' first values
            self._policy = policy.load(self._device, recipe.sampling, "learner")
        self._parameters = trained_parameters(self._policy.network)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=self._settings.learning_rate,
            betas=(self._settings.adam_beta1, self._settings.adam_beta2),
            eps=self._settings.adam_epsilon,
            weight_decay=self._settings.weight_decay,
            fused=True,
        )
        self._scaler = torch.amp.GradScaler(self._device, enabled=policy.dtype == "float16")
        self._version = 0
        self._published = (read_weights(self._policy.network, 0),)
        self._check_micro_batches()

    def _check_micro_batches(self) -> None:
        steps, size = self._recipe.sampling.kept_steps(len(self._policy.noisy_steps)), self._settings.micro_batch_size
        if self._settings.images_per_step * steps % size:
            raise ValueError(
                f"this model's schedule keeps {steps} steps with noise, so an optimizer step has "
                f"{self._settings.images_per_step} images × {steps} transitions, which learner.micro_batch_size = {size} "
                "does not divide"
            )

    def ready(self) -> bool:
        """True, once the policy is loaded."""
        return True

    def weights(self) -> tuple[LoraWeights, ...]:
        """The versions that samplers may still be asked for, the newest last."""
        return self._published

    def update(self, batch: TrainBatch, *trajectories: Trajectory) -> tuple[dict[str, float], LoraWeights]:
        """Learn from a round; its metrics, and the weights of the next version.

        RuntimeError: a trajectory was not drawn with the weights that its version stands for.
        """
        start = time.perf_counter()
        for report in batch.reports:
            self._refuse_mismatch(report)
        transitions = round_transitions(trajectories, batch.advantages, self._device)
        metrics = UpdateMetrics(self._policy.num_steps, int(np.prod(self._policy.latent_shape)))
        order = np.arange(0)
        for inner_epoch in range(self._settings.inner_epochs):
            order = transition_order(self._recipe.seed, batch.round, inner_epoch, len(transitions.images))
            for first in range(0, len(order), self._settings.images_per_step):
                self._optimizer_step(transitions, order[first : first + self._settings.images_per_step], metrics)
        self._measure_divergence(transitions, order, metrics)
        self._version += 1
        weights = read_weights(self._policy.network, self._version)
        self._published = (*self._published, weights)[-(self._recipe.max_policy_lag + 1) :]
        return {**metrics.summary(), "seconds/learn": time.perf_counter() - start}, weights

    def _refuse_mismatch(self, report: TaskReport) -> None:
        task, known = report.task, {weights.policy_version: weights.fingerprint for weights in self._published}
        place = f"task {task.index} of round {task.round}"
        if task.policy_version not in known:
            raise RuntimeError(
                f"{place} was drawn with version {task.policy_version}, and the learner keeps {sorted(known)}"
            )
        if known[task.policy_version] != report.fingerprint:
            raise RuntimeError(
                f"{place} was drawn with weights {report.fingerprint[:12]}, and version {task.policy_version} "
                f"is {known[task.policy_version][:12]}"
            )
        if report.modules_bound != len(self._parameters):
            raise RuntimeError(
                f"{place}: its sampler bound {report.modules_bound} of {len(self._parameters)} parameters"
            )

    def _optimizer_step(self, transitions: RoundTransitions, images: np.ndarray, metrics: UpdateMetrics) -> None:
        pairs = transitions.pairs_of(images)
        self._optimizer.zero_grad(set_to_none=True)
        for micro_batch in micro_batches(pairs, self._settings.micro_batch_size):
            result = self._algorithm.pair_loss(self._policy, transitions.batch(micro_batch))
            # The mean over the optimizer step's pairs, whatever the micro-batch is.
            self._scaler.scale(result.loss.sum() / len(pairs)).backward()
            metrics.add_micro_batch(result)
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.max_grad_norm, foreach=True)
        self._scaler.step(self._optimizer)
        scale = self._scaler.get_scale() if self._scaler.is_enabled() else 1.0
        self._scaler.update()
        skipped = self._scaler.is_enabled() and self._scaler.get_scale() < scale
        metrics.end_optimizer_step(norm, skipped)

    @torch.no_grad()
    def _measure_divergence(self, transitions: RoundTransitions, order: np.ndarray, metrics: UpdateMetrics) -> None:
        """KL from the sampler's policy to the one learned, on a few images and all of their steps."""
        size = self._settings.micro_batch_size
        wanted = -(-size // transitions.num_places)
        pairs = transitions.pairs_of(order[:wanted])
        for first in range(0, len(pairs), size):
            batch = transitions.batch(pairs[first : first + size])
            metrics.add_divergence(batch.steps, self._algorithm.pair_loss(self._policy, batch).log_ratio)

    def state(self) -> LearnerState:
        """A copy of all state."""
        optimizer = {}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                optimizer[f"{name}/{key}"] = value.detach().cpu().contiguous().numpy().copy()
        return LearnerState(self._version, self._published, optimizer, self._scaler.state_dict())

    def load_state(self, state: LearnerState) -> None:
        """Go on from `state`. ValueError: it belongs to another network."""
        load_weights(self._policy.network, state.weights[-1])
        for name, parameter in self._parameters.items():
            for key, value in _of_parameter(state.optimizer, name).items():
                # In the parameter's own memory layout, as AdamW made it; fused, it has its step count on the device too.
                like = parameter if value.shape == parameter.shape else parameter.new_empty(value.shape)
                self._optimizer.state[parameter][key] = torch.empty_like(like).copy_(torch.from_numpy(value.copy()))
        if state.scaler:
            self._scaler.load_state_dict(state.scaler)
        self._version, self._published = state.policy_version, state.weights

    def save_policy(self, folder: str) -> str:
        """Write the trained weights for diffusers; the path written."""
        return str(self._policy.save(Path(folder)))


def _of_parameter(optimizer: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key.rpartition("/")[2]: value for key, value in optimizer.items() if key.rpartition("/")[0] == name}

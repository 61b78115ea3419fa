"""Metrics of a round's update: collected on the device without synchronization, and summarized once at the end."""

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.restart_check import RestartError
from ray_ddpo.learner.weight_check import Arrival

NUMBERS = tuple(each.name for each in dataclasses.fields(TransitionLoss) if each.name != "terms")
Divergence = list[tuple[Tensor, Tensor]]  # by batch: the transitions' steps, and their log_prob − old_log_prob


class UpdateMetrics:
    """The metrics of a round, collected per transition. `summary` computes and names them."""

    def __init__(self, num_steps: int, latent_elements: int) -> None:
        self.parts_done = 0
        self._seconds = 0.0
        self._arrivals: list[Arrival] = []
        self._num_steps = num_steps
        self._latent_elements = latent_elements
        self.optimizer_steps = 0
        self._skipped_steps = 0
        self._learning_rate = math.nan
        self._any_update = False
        self._first_log_ratios: list[Tensor] = []
        self._results: list[TransitionLoss] = []
        self._steps: list[Tensor] = []
        self._gradient_norms: list[Tensor] = []
        self._divergence: Divergence = []
        self._reference_kl: list[Tensor] = []
        self._restarts: list[RestartError] = []

    def add_micro_batch(self, result: TransitionLoss, steps: Int[Tensor, "B"] | None) -> None:
        """Add the loss and diagnostics of a micro-batch.

        Args:
            steps: the transitions' steps; None if the batch has noised samples.
        """
        self._results.append(dataclasses.replace(result, loss=result.loss.detach(), terms={}))
        if steps is not None:
            self._steps.append(steps)
        if not self._any_update and result.log_ratio is not None:  # before any optimizer step the ratio should be 1
            self._first_log_ratios.append(result.log_ratio)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the optimizer step that begins."""
        self._learning_rate = rate

    def end_optimizer_step(self, gradient_norm: Float[Tensor, ""]) -> None:
        """Add the gradient norm of an optimizer step before clipping. If not finite, the step was not applied."""
        self._gradient_norms.append(gradient_norm.detach())
        self._any_update = True
        self.optimizer_steps += 1

    def skip_optimizer_step(self) -> None:
        """Count an optimizer step that was skipped because all its transitions are masked or its gradient is 0."""
        self.optimizer_steps += 1
        self._skipped_steps += 1

    def end_part(self, seconds: float, arrival: Arrival) -> None:
        """Add a part of the round: its duration, and the result of the check of its weights."""
        self.parts_done += 1
        self._seconds += seconds
        self._arrivals.append(arrival)

    def set_divergence(self, divergence: Divergence) -> None:
        """Set the divergence of the updated policy from the behavior policy."""
        self._divergence = divergence

    def set_reference_kl(self, kl: list[Tensor]) -> None:
        """Set the KL to the pretrained policy after the update, by batch, for algorithms that do not compute it."""
        self._reference_kl = kl

    def set_restart(self, found: RestartError) -> None:
        """Add the differences between the sampler's images and rewards and the learner's, of a part of the round."""
        self._restarts.append(found)

    def gather(self, process_group: ProcessGroup) -> None:
        """Add the transitions of the other ranks, so that the summary is of all transitions."""
        if process_group.world_size == 1:
            return

        def of_all(values: Tensor | None) -> Tensor | None:
            found = process_group.all_gather(values)
            return None if found is None else found.float()

        joined: dict[str, Any] = {name: of_all(self._concatenated(name)) for name in NUMBERS}
        loss, steps, first = joined.pop("loss"), of_all(_cat(self._steps)), of_all(_cat(self._first_log_ratios))
        self._results = [] if loss is None else [dataclasses.replace(TransitionLoss(loss), **joined)]
        self._steps = [] if steps is None else [steps.long()]
        self._first_log_ratios = [] if first is None else [first]

    def kl_nats(self, divergence: Divergence) -> float:
        """Return −D · mean(log_prob − old_log_prob), with D latent elements; NaN if there are no transitions."""
        if not divergence:  # all images of the round's last part are dropped
            return math.nan
        return float(self._nats(divergence).mean())

    def _nats(self, divergence: Divergence) -> Float[Tensor, "N"]:
        return -torch.cat([log_ratio for _, log_ratio in divergence]).double() * self._latent_elements

    def log_ratios(self) -> Float[Tensor, "N"] | None:
        """Return log_prob − old_log_prob of every transition in training; None if the algorithm has no ratio."""
        return self._concatenated("log_ratio")

    def _copy_to_host(self) -> None:
        """Copy the round's columns to the host, so that the summary does not wait for the device at each number."""
        columns = {name: self._concatenated(name) for name in NUMBERS}
        on_host: dict[str, Any] = {name: value.cpu() for name, value in columns.items() if value is not None}
        self._results = [TransitionLoss(**on_host)] if on_host else []
        self._steps = [torch.cat(self._steps).cpu()] if self._steps else []
        self._divergence = [(steps.cpu(), log_ratio.cpu()) for steps, log_ratio in self._divergence]

    def summary(self) -> dict[str, float]:
        """Return the round's metrics, without those that the algorithm does not compute."""
        self._copy_to_host()
        loss = self._concatenated("loss")
        norms = torch.stack(self._gradient_norms).cpu() if self._gradient_norms else torch.empty(0)
        applied = norms[norms.isfinite()]
        metrics = {
            "loss": math.nan if loss is None else float(loss.mean()),
            "grad_norm": float(applied.mean()) if len(applied) else math.nan,
            "learning_rate": self._learning_rate,
            "optimizer_steps": float(self.optimizer_steps),
            "optimizer_steps_skipped": float(self._skipped_steps + len(norms) - len(applied)),
            "optimizer_steps_not_finite": float(len(norms) - len(applied)),
            "log_prob_check/max_abs": max((each.largest for each in self._arrivals), default=0.0),
            "seconds/learn": self._seconds,
        }
        rounding = [each.rounding for each in self._arrivals if each.rounding is not None]
        if rounding:
            metrics["log_prob_check/rounding"] = max(rounding)
        return metrics | self._ratios() | self._off_policy(loss) | self._kl() | self._rewards()

    def _rewards(self) -> dict[str, float]:
        """Return the metrics of algorithms on differentiable rewards."""
        metrics, reward = {}, self._concatenated("reward")
        if reward is not None:
            metrics["learner/reward"] = float(reward.mean())
            metrics["learner/reward_min"] = float(reward.min())
        shift = self._concatenated("prediction_shift")
        if shift is not None:
            metrics["learner/prediction_shift"] = float(shift.mean())
        if self._restarts:
            metrics["restart_check/grey_levels"] = max(each.grey_levels for each in self._restarts)
            metrics["restart_check/reward"] = max(each.reward for each in self._restarts)
        return metrics

    def _concatenated(self, name: str) -> Float[Tensor, "N"] | None:
        """Return a field of all the round's transitions; None if the algorithm does not compute it."""
        return _cat([getattr(result, name) for result in self._results if getattr(result, name) is not None])

    def _by_step(self, name: str, values: Float[Tensor, "N"], steps: Int[Tensor, "N"]) -> dict[str, float]:
        of_steps = {step: values[steps == step] for step in range(self._num_steps)}
        return {f"{name}/step_{step:02d}": float(part.mean()) for step, part in of_steps.items() if len(part)}

    def _unmasked(self, name: str) -> Float[Tensor, "N"] | None:
        """Return a field of the round's unmasked transitions."""
        values, mask = self._concatenated(name), self._concatenated("mask")
        return values if values is None or mask is None else values[mask > 0]

    def _ratios(self) -> dict[str, float]:
        """Return the metrics of the ratio and its clipping, over unmasked transitions."""
        log_ratio, clipped, mask = self._unmasked("log_ratio"), self._unmasked("clipped"), self._concatenated("mask")
        metrics = {}
        if log_ratio is not None:
            metrics |= {
                "ratio/mean": float(log_ratio.exp().mean()),
                "ratio/min": float(log_ratio.min().exp()) if len(log_ratio) else math.nan,
                "ratio/max": float(log_ratio.max().exp()) if len(log_ratio) else math.nan,
                "ratio/max_abs_log": float(torch.cat(self._first_log_ratios).abs().max()),
            }
        agrees = self._concatenated("agrees")
        if agrees is not None:
            metrics["preference_accuracy"] = float(agrees.mean())
        if clipped is not None:
            metrics |= {"clip_fraction": float(clipped.mean())}
            steps = _cat(self._steps)
            if steps is not None:  # noised samples have none
                metrics |= self._by_step("clip_fraction", clipped, steps if mask is None else steps[mask > 0])
        for name, share in (("dual_clip_fraction", "dual_clipped"), ("trust_region_fraction", "distrusted")):
            held = self._unmasked(share)
            metrics |= {} if held is None else {name: float(held.mean())}
        return metrics

    def _kl(self) -> dict[str, float]:
        """Return the KL to the behavior policy, also by step, and to the pretrained policy."""
        metrics = {"kl_nats": self.kl_nats(self._divergence)}
        if self._divergence:
            steps = torch.cat([of_batch for of_batch, _ in self._divergence])
            metrics |= self._by_step("kl_nats", self._nats(self._divergence), steps)
        moving = self._unmasked("kl_moving_reference")
        metrics |= {} if moving is None else {"kl_moving_reference_nats": float(moving.mean())}
        reference = self._unmasked("kl_reference")
        if reference is None and self._reference_kl:
            reference = torch.cat(self._reference_kl)
        return metrics if reference is None else metrics | {"kl_reference_nats": float(reference.mean())}

    def _off_policy(self, loss: Float[Tensor, "N"] | None) -> dict[str, float]:
        """Return the metrics of masks and importance weights, and the mean loss over unmasked transitions."""
        metrics = {}
        mask, weight = self._concatenated("mask"), self._unmasked("importance_weight")
        if mask is not None and loss is not None:
            num_unmasked = float(mask.sum())
            metrics |= {
                "masked_fraction": 1 - num_unmasked / len(loss),
                "loss": float(loss.sum()) / max(num_unmasked, 1),
            }
        if weight is not None:
            metrics["importance_weight/mean"] = float(weight.mean())
        return metrics


def _cat(values: list[Tensor]) -> Tensor | None:
    return torch.cat(values) if values else None

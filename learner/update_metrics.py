"""What a round's update looked like: gathered on the device without waiting for it, summed up once at the end."""

import dataclasses
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learner.algorithms.algorithm import PairLoss


class UpdateMetrics:
    """Gathers per-pair numbers; `summary` gives them their names."""

    def __init__(self, num_steps: int, latent_elements: int) -> None:
        self.parts_done = 0
        self._seconds = 0.0
        self._largest_difference = 0.0
        self._num_steps = num_steps
        self._latent_elements = latent_elements
        self._optimizer_steps = 0
        self._skipped = 0
        self._any_update = False
        self._first_log_ratios: list[Tensor] = []
        self._results: list[PairLoss] = []
        self._gradient_norms: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._divergences: list[Tensor] = []

    def add_micro_batch(self, result: PairLoss) -> None:
        """A micro-batch that was learned from."""
        self._results.append(dataclasses.replace(result, loss=result.loss.detach()))
        if not self._any_update:  # before any update the ratio should be 1
            self._first_log_ratios.append(result.log_ratio)

    def end_optimizer_step(self, gradient_norm: Float[Tensor, ""], skipped: bool) -> None:
        """The gradient norm before clipping, and whether float16's scaler left the step out."""
        if not skipped:  # a skipped step's norm is infinite
            self._gradient_norms.append(gradient_norm.detach())
        self._any_update = True
        self._optimizer_steps += 1
        self._skipped += skipped

    def leave_out_optimizer_step(self) -> None:
        """An optimizer step that had nothing left to learn from."""
        self._optimizer_steps += 1
        self._skipped += 1

    def end_part(self, seconds: float, largest_difference: float) -> None:
        """A part of the round is learned from; how long it took, and the largest difference that its check found."""
        self.parts_done += 1
        self._seconds += seconds
        self._largest_difference = max(self._largest_difference, largest_difference)

    def add_divergence(self, steps: Int[Tensor, "B"], log_ratio: Float[Tensor, "B"]) -> None:
        """log_prob − old_log_prob after the last update, and each pair's step."""
        self._steps.append(steps)
        self._divergences.append(log_ratio)

    def summary(self) -> dict[str, float]:
        """Metrics of the round. `kl_nats` is −D · mean(log_prob − old_log_prob), D the number of latent elements."""
        log_ratio = torch.cat([result.log_ratio for result in self._results])
        loss = torch.cat([result.loss for result in self._results])
        metrics = {
            "loss": float(loss.mean()),
            "ratio/mean": float(log_ratio.exp().mean()),
            "ratio/min": float(log_ratio.min().exp()),
            "ratio/max": float(log_ratio.max().exp()),
            "ratio/max_abs_log": float(torch.cat(self._first_log_ratios).abs().max()),
            "clip_fraction": float(torch.cat([result.clipped for result in self._results]).mean()),
            "grad_norm": float(torch.stack(self._gradient_norms).mean()) if self._gradient_norms else math.nan,
            "optimizer_steps": float(self._optimizer_steps),
            "optimizer_steps_skipped": float(self._skipped),
            "log_prob_check/max_abs": self._largest_difference,
            "seconds/learn": self._seconds,
        }
        return metrics | self._corrections(loss) | self._divergence()

    def _divergence(self) -> dict[str, float]:
        if not self._divergences:  # all images of the round's last part are set aside
            return {"kl_nats": math.nan}
        divergence = -torch.cat(self._divergences).double() * self._latent_elements
        steps = torch.cat(self._steps)
        by_step = {step: divergence[steps == step] for step in range(self._num_steps)}
        by_step = {f"kl_nats/step_{step:02d}": float(part.mean()) for step, part in by_step.items() if len(part)}
        return {"kl_nats": float(divergence.mean())} | by_step

    def _corrections(self, loss: Float[Tensor, "N"]) -> dict[str, float]:
        """Of an algorithm that masks pairs or weighs them: how many, how much, and the loss of those left."""
        metrics = {}
        kept = [result.kept for result in self._results if result.kept is not None]
        if kept:
            left = float(torch.cat(kept).sum())
            metrics |= {"masked_fraction": 1 - left / len(loss), "loss": float(loss.sum()) / max(left, 1)}
        weights = [result.behaviour_weight for result in self._results if result.behaviour_weight is not None]
        if weights:
            metrics["behaviour_weight/mean"] = float(torch.cat(weights).mean())
        return metrics

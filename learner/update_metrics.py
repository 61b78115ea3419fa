"""What a round's update looked like: gathered on the device without waiting for it, summed up once at the end."""

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.weight_check import Arrival

NUMBERS = tuple(each.name for each in dataclasses.fields(TransitionLoss) if each.name != "terms")
Divergence = list[tuple[Tensor, Tensor]]  # of batches of pairs: each pair's step, and its log_prob − old_log_prob


class UpdateMetrics:
    """Gathers per-pair numbers; `summary` gives them their names."""

    def __init__(self, num_steps: int, latent_elements: int) -> None:
        self.parts_done = 0
        self._seconds = 0.0
        self._arrivals: list[Arrival] = []
        self._num_steps = num_steps
        self._latent_elements = latent_elements
        self.optimizer_steps = 0
        self._left_out = 0
        self._any_update = False
        self._first_log_ratios: list[Tensor] = []
        self._results: list[TransitionLoss] = []
        self._steps: list[Tensor] = []
        self._gradient_norms: list[Tensor] = []
        self._divergence: Divergence = []
        self._reference_kl: list[Tensor] = []

    def add_micro_batch(self, result: TransitionLoss, steps: Int[Tensor, "B"] | None) -> None:
        """A micro-batch that was learned from, and each pair's step; None: its pairs are not steps of a path."""
        self._results.append(dataclasses.replace(result, loss=result.loss.detach(), terms={}))
        if steps is not None:
            self._steps.append(steps)
        if not self._any_update and result.log_ratio is not None:  # before any update the ratio should be 1
            self._first_log_ratios.append(result.log_ratio)

    def end_optimizer_step(self, gradient_norm: Float[Tensor, ""]) -> None:
        """The gradient norm before clipping. If it is not finite, the step was not applied."""
        self._gradient_norms.append(gradient_norm.detach())
        self._any_update = True
        self.optimizer_steps += 1

    def leave_out_optimizer_step(self) -> None:
        """An optimizer step that had nothing left to learn from."""
        self.optimizer_steps += 1
        self._left_out += 1

    def end_part(self, seconds: float, arrival: Arrival) -> None:
        """A part of the round is learned from; how long it took, and what the check of its weights found."""
        self.parts_done += 1
        self._seconds += seconds
        self._arrivals.append(arrival)

    def set_divergence(self, divergence: Divergence) -> None:
        """How far the last update has moved from the policy that sampled."""
        self._divergence = divergence

    def set_reference_kl(self, kl: list[Tensor]) -> None:
        """KL of pairs to the pretrained policy after the update, in batches; for algorithms that do not look at it."""
        self._reference_kl = kl

    def gather(self, ranks: ProcessGroup) -> None:
        """Take in what the other ranks have learned from, so that the summary is that of all pairs."""
        if ranks.world_size == 1:
            return

        def of_all(values: Tensor | None) -> Tensor | None:
            found = ranks.all_gather(values)
            return None if found is None else found.float()

        joined: dict[str, Any] = {name: of_all(self._joined(name)) for name in NUMBERS}
        loss, steps, first = joined.pop("loss"), of_all(_cat(self._steps)), of_all(_cat(self._first_log_ratios))
        self._results = [] if loss is None else [dataclasses.replace(TransitionLoss(loss), **joined)]
        self._steps = [] if steps is None else [steps.long()]
        self._first_log_ratios = [] if first is None else [first]

    def kl_nats(self, divergence: Divergence) -> float:
        """−D · mean(log_prob − old_log_prob), D the number of latent elements; no number where there is no pair."""
        if not divergence:  # all images of the round's last part are left out
            return math.nan
        return float(self._nats(divergence).mean())

    def _nats(self, divergence: Divergence) -> Float[Tensor, "N"]:
        return -torch.cat([log_ratio for _, log_ratio in divergence]).double() * self._latent_elements

    def log_ratios(self) -> Float[Tensor, "N"] | None:
        """log_prob − old_log_prob of every pair, when it was learned from; None where the algorithm has no ratio."""
        return self._joined("log_ratio")

    def summary(self) -> dict[str, float]:
        """Metrics of the round; of what the algorithm does not look at there are none."""
        loss = self._joined("loss")
        norms = torch.stack(self._gradient_norms).cpu() if self._gradient_norms else torch.empty(0)
        applied = norms[norms.isfinite()]
        metrics = {
            "loss": math.nan if loss is None else float(loss.mean()),
            "grad_norm": float(applied.mean()) if len(applied) else math.nan,
            "optimizer_steps": float(self.optimizer_steps),
            "optimizer_steps_skipped": float(self._left_out + len(norms) - len(applied)),
            "optimizer_steps_not_finite": float(len(norms) - len(applied)),
            "log_prob_check/max_abs": max((each.largest for each in self._arrivals), default=0.0),
            "seconds/learn": self._seconds,
        }
        rounding = [each.rounding for each in self._arrivals if each.rounding is not None]
        if rounding:
            metrics["log_prob_check/rounding"] = max(rounding)
        return metrics | self._ratios() | self._corrections(loss) | self._kl()

    def _joined(self, name: str) -> Float[Tensor, "N"] | None:
        """One value of all pairs of the round; None where the algorithm has none."""
        return _cat([getattr(result, name) for result in self._results if getattr(result, name) is not None])

    def _by_step(self, name: str, values: Float[Tensor, "N"], steps: Int[Tensor, "N"]) -> dict[str, float]:
        of_steps = {step: values[steps == step] for step in range(self._num_steps)}
        return {f"{name}/step_{step:02d}": float(part.mean()) for step, part in of_steps.items() if len(part)}

    def _unmasked(self, name: str) -> Float[Tensor, "N"] | None:
        """One value of all pairs of the round that are not masked."""
        values, mask = self._joined(name), self._joined("mask")
        return values if values is None or mask is None else values[mask > 0]

    def _ratios(self) -> dict[str, float]:
        log_ratio, clipped, mask = self._unmasked("log_ratio"), self._unmasked("clipped"), self._joined("mask")
        metrics = {}
        if log_ratio is not None:
            metrics |= {
                "ratio/mean": float(log_ratio.exp().mean()),
                "ratio/min": float(log_ratio.min().exp()) if len(log_ratio) else math.nan,
                "ratio/max": float(log_ratio.max().exp()) if len(log_ratio) else math.nan,
                "ratio/max_abs_log": float(torch.cat(self._first_log_ratios).abs().max()),
            }
        if clipped is not None:
            steps = torch.cat(self._steps)
            metrics |= {"clip_fraction": float(clipped.mean())}
            metrics |= self._by_step("clip_fraction", clipped, steps if mask is None else steps[mask > 0])
        return metrics

    def _kl(self) -> dict[str, float]:
        metrics = {"kl_nats": self.kl_nats(self._divergence)}
        if self._divergence:
            steps = torch.cat([of_batch for of_batch, _ in self._divergence])
            metrics |= self._by_step("kl_nats", self._nats(self._divergence), steps)
        reference = self._unmasked("kl_reference")
        if reference is None and self._reference_kl:
            reference = torch.cat(self._reference_kl)
        return metrics if reference is None else metrics | {"kl_reference_nats": float(reference.mean())}

    def _corrections(self, loss: Float[Tensor, "N"] | None) -> dict[str, float]:
        """Of an algorithm that masks pairs or weighs them: how many, how much, and the loss of those left."""
        metrics = {}
        mask, weight = self._joined("mask"), self._unmasked("importance_weight")
        if mask is not None and loss is not None:
            left = float(mask.sum())
            metrics |= {"masked_fraction": 1 - left / len(loss), "loss": float(loss.sum()) / max(left, 1)}
        if weight is not None:
            metrics["importance_weight/mean"] = float(weight.mean())
        return metrics


def _cat(values: list[Tensor]) -> Tensor | None:
    return torch.cat(values) if values else None

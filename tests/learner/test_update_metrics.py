"""The update's metrics, each worked out by hand."""

import dataclasses
import math

import pytest
import torch

from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.update_metrics import UpdateMetrics


def result(loss: list[float], log_ratio: list[float], clipped: list[float]) -> TransitionLoss:
    return TransitionLoss(torch.tensor(loss), torch.tensor(log_ratio), torch.tensor(clipped))


@pytest.fixture
def summary() -> dict[str, float]:
    """Two optimizer steps, the first of two micro-batches, then three pairs looked at again."""
    metrics = UpdateMetrics(num_steps=3, latent_elements=1000)
    metrics.add_micro_batch(result([1.0, 2.0], [0.0, -0.001], [0.0, 0.0]), torch.tensor([0, 1]))
    metrics.add_micro_batch(result([3.0, 6.0], [0.0, 0.0005], [0.0, 0.0]), torch.tensor([0, 1]))
    metrics.end_optimizer_step(torch.tensor(4.0))
    metrics.add_micro_batch(
        result([0.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 2])
    )
    metrics.end_optimizer_step(torch.tensor(math.inf))
    looked_at = [(torch.tensor([0, 1]), torch.tensor([-0.002, -0.006])), (torch.tensor([0]), torch.tensor([0.001]))]
    metrics.set_divergence(looked_at)
    return metrics.summary()


def test_means_are_over_all_pairs_of_the_round(summary: dict[str, float]) -> None:
    assert summary["loss"] == 12 / 8
    assert summary["ratio/mean"] == pytest.approx((2 + math.exp(-0.001) + math.exp(0.0005) + 5) / 8, rel=1e-6)
    assert summary["clip_fraction"] == 1 / 8


def test_the_smallest_and_largest_ratio_are_of_the_whole_round(summary: dict[str, float]) -> None:
    assert summary["ratio/min"] == pytest.approx(math.exp(-0.001))
    assert summary["ratio/max"] == pytest.approx(2.0)


def test_the_largest_log_ratio_is_of_the_pairs_before_any_update(summary: dict[str, float]) -> None:
    assert summary["ratio/max_abs_log"] == pytest.approx(0.001)  # not log 2, which came after it


def test_kl_is_minus_the_mean_log_ratio_times_the_latents_elements(summary: dict[str, float]) -> None:
    # −1000 · (−0.002 − 0.006 + 0.001) / 3 nats; at step 0 alone −1000 · (−0.002 + 0.001) / 2
    assert summary["kl_nats"] == pytest.approx(7 / 3, rel=1e-5)
    assert summary["kl_nats/step_00"] == pytest.approx(0.5, rel=1e-5)
    assert summary["kl_nats/step_01"] == pytest.approx(6.0, rel=1e-5)
    assert "kl_nats/step_02" not in summary  # nobody looked at that step


def test_the_share_that_is_clipped_is_told_step_by_step(summary: dict[str, float]) -> None:
    of_steps = [summary[f"clip_fraction/step_{step:02d}"] for step in range(3)]
    assert of_steps == [1 / 4, 0, 0]  # at step 0 the pair that was clipped and three others


def test_steps_are_counted_also_those_that_were_left_out(summary: dict[str, float]) -> None:
    assert summary["optimizer_steps"] == 2 and summary["optimizer_steps_skipped"] == 1
    assert summary["grad_norm"] == 4.0  # of the step that was taken: that of one left out may be infinite


def test_a_step_with_nothing_left_is_counted_and_the_next_is_still_before_any_update() -> None:
    metrics = UpdateMetrics(num_steps=1, latent_elements=1)
    metrics.skip_optimizer_step()
    metrics.add_micro_batch(result([1.0], [0.25], [0.0]), torch.tensor([0]))
    metrics.end_optimizer_step(torch.tensor(1.0))
    metrics.add_micro_batch(result([1.0], [0.5], [0.0]), torch.tensor([0]))
    metrics.end_optimizer_step(torch.tensor(1.0))
    metrics.set_divergence([(torch.tensor([0]), torch.tensor([0.0]))])
    summary = metrics.summary()
    assert summary["optimizer_steps"] == 3 and summary["optimizer_steps_skipped"] == 1
    assert summary["ratio/max_abs_log"] == 0.25


def test_the_estimate_of_kl_is_right_for_two_gaussians() -> None:
    # KL of N(0, σ²) to N(Δ, σ²) is D Δ² / 2σ² = 32 · 0.01 / 0.5 = 0.64 nats; standard error √(2 · 0.64 / 5000) = 0.016
    generator = torch.Generator().manual_seed(0)
    sampled = torch.randn(5000, 32, generator=generator) * 0.5
    log_ratio = (sampled.square() - (sampled - 0.1).square()).mean(1) / (2 * 0.25)
    metrics = UpdateMetrics(num_steps=1, latent_elements=32)
    metrics.add_micro_batch(result([0.0], [0.0], [0.0]), torch.tensor([0]))
    metrics.end_optimizer_step(torch.tensor(0.0))
    metrics.set_divergence([(torch.zeros(5000, dtype=torch.long), log_ratio)])
    assert metrics.summary()["kl_nats"] == pytest.approx(0.64, abs=0.05)


def test_what_is_masked_counts_neither_in_the_loss_nor_in_its_denominator() -> None:
    metrics = UpdateMetrics(num_steps=1, latent_elements=1)
    for kept, weight in (([1.0, 0.0], [1.0, 2.0]), ([0.0, 1.0], [3.0, 4.0])):
        part = result([kept[0] * 6.0, kept[1] * 4.0], [0.0, 0.0], [0.0, 0.0])
        weighed = dataclasses.replace(part, mask=torch.tensor(kept), importance_weight=torch.tensor(weight))
        metrics.add_micro_batch(weighed, torch.tensor([0, 0]))
    metrics.end_optimizer_step(torch.tensor(1.0))
    metrics.set_divergence([(torch.tensor([0]), torch.tensor([0.0]))])
    summary = metrics.summary()
    assert summary["masked_fraction"] == 0.5 and summary["loss"] == 5.0 and summary["importance_weight/mean"] == 2.5


def test_an_algorithm_that_neither_masks_nor_weighs_has_no_such_metrics(summary: dict[str, float]) -> None:
    assert "masked_fraction" not in summary and "importance_weight/mean" not in summary


def test_gathering_keeps_no_graph() -> None:
    parameter = torch.tensor([2.0], requires_grad=True)
    metrics = UpdateMetrics(num_steps=1, latent_elements=1)
    metrics.add_micro_batch(TransitionLoss(parameter * 3, torch.zeros(1), torch.zeros(1)), torch.tensor([0]))
    assert not metrics._results[0].loss.requires_grad


def test_a_loss_without_a_ratio_has_no_metrics_of_one_and_a_kl_to_the_pretrained_model_has_its_mean() -> None:
    metrics = UpdateMetrics(num_steps=2, latent_elements=4)
    metrics.add_micro_batch(TransitionLoss(torch.tensor([1.0, 2.0])), None)
    metrics.end_optimizer_step(torch.tensor(1.0))
    summary = metrics.summary()
    assert summary["loss"] == 1.5 and not [name for name in summary if name.startswith(("ratio", "clip"))]
    assert "kl_reference_nats" not in summary and math.isnan(summary["kl_nats"])
    pulled = dataclasses.replace(result([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]), kl_reference=torch.tensor([1.0, 3.0]))
    metrics = UpdateMetrics(num_steps=2, latent_elements=4)
    metrics.add_micro_batch(pulled, torch.tensor([0, 1]))
    assert metrics.summary()["kl_reference_nats"] == 2


def test_a_round_in_which_nothing_is_learned_from_has_no_number_for_its_loss() -> None:
    summary = UpdateMetrics(num_steps=1, latent_elements=1).summary()
    assert math.isnan(summary["loss"]) and summary["optimizer_steps"] == 0


def test_the_log_ratios_of_all_pairs_are_kept_to_be_looked_at() -> None:
    metrics = UpdateMetrics(num_steps=3, latent_elements=1000)
    assert metrics.log_ratios() is None
    metrics.add_micro_batch(result([1.0, 2.0], [0.0, -0.5], [0.0, 0.0]), torch.tensor([0, 1]))
    metrics.add_micro_batch(result([1.0], [0.25], [0.0]), torch.tensor([2]))
    log_ratios = metrics.log_ratios()
    assert log_ratios is not None and log_ratios.tolist() == [0.0, -0.5, 0.25]

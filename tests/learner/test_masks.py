"""A masked transition counts for nothing: in every term of the loss, in every mean, for every algorithm that masks."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.trajectory import TransitionBatch
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.off_policy import unmasked_mean_factor
from ray_ddpo.learner.update_metrics import UpdateMetrics
from tests.accepted_page import assert_accepted
from tests.learner.test_algorithms import ELEMENTS, PAIRS, REFERRED, STD, Slow, Toy, limited, log_prob, normal, slope
from tests.reference import ddpo_reference as reference

LEFT = [1, 4]  # the other rows have moved too far
LIMIT = 1.0
CLIP = 1e-2
BAND = 1e-3


def masked_batch() -> TransitionBatch:
    """Pairs with all references, and behavior means near the present ones for the rows that are left alone."""
    means = Toy().network["theta"].detach() * REFERRED.latents
    far = torch.tensor([0.01 if row in LEFT else 10.0 for row in range(PAIRS)]).view(-1, 1, 1, 1)
    shifted = REFERRED.old_log_probs + torch.linspace(-2e-3, 2e-3, PAIRS)
    return dataclasses.replace(REFERRED, behavior_means=means + far * normal(8), proximal_log_probs=shifted)


BATCH = masked_batch()
PROXIMAL = {"ratio": "proximal", "importance_weight": BAND, "max_drift_nats": LIMIT}
CASES: dict[
    str, tuple[dict[str, Any], float, bool]
] = {  # keys, coefficient of the KL in nats, against the proximal policy
    "ddpo_is, no KL": ({"name": "ddpo_is"}, 0.0, False),
    "ddpo_is": ({"name": "ddpo_is", "kl_coef_nats": 0.3}, 0.3, False),
    "dpok": ({"name": "dpok"}, 0.01 / ELEMENTS, False),
    "grpo": ({"name": "grpo", "kl_coef": 0.2}, 0.2 / ELEMENTS, False),
    "grpo, weights of two policies": ({"name": "grpo", "kl_coef_nats": 0.3}, 0.3, True),
}


def result_of(case: str, batch: TransitionBatch, toy: Toy):
    keys, _, proximal = CASES[case]
    off_policy = PROXIMAL if proximal else {"max_drift_nats": LIMIT}
    algorithm = build(ALGORITHMS, {**keys, "clip_range": CLIP, "off_policy": off_policy}, "algorithm")
    batch = batch if proximal else dataclasses.replace(batch, proximal_log_probs=None)
    if not CASES[case][1]:
        batch = dataclasses.replace(batch, reference_means=None)
    return algorithm.compute_loss(toy, batch)


def slow_loss(case: str) -> Slow:
    _, coefficient, proximal = CASES[case]
    old, start = BATCH.old_log_probs.tolist(), BATCH.proximal_log_probs.tolist()

    def loss(theta: np.ndarray, row: int) -> float:
        anchor = start[row] if proximal else old[row]
        weight = math.exp(min(max(start[row] - old[row], -BAND), BAND)) if proximal else 1.0
        surrogate = reference.clipped_surrogate(log_prob(theta, BATCH, row), anchor, limited(row), CLIP)
        kl = reference.gaussian_kl(theta * BATCH.latents[row].numpy(), BATCH.reference_means[row].numpy(), STD)
        return weight * surrogate + coefficient * kl

    return loss


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_mean_over_the_transitions_that_are_left(case: str) -> None:
    assert_accepted("`max_drift_nats` together with a KL")
    toy, slow = Toy(), slow_loss(case)
    theta = toy.network["theta"].detach().numpy().copy()
    result = result_of(case, BATCH, toy)
    assert result.mask.nonzero().flatten().tolist() == LEFT
    assert float(result.loss.detach().sum()) / len(LEFT) == pytest.approx(
        np.mean([slow(theta, row) for row in LEFT]), rel=1e-9
    )
    (result.loss.sum() / PAIRS * unmasked_mean_factor(PAIRS, len(LEFT))).backward()
    expected = np.mean([slope(slow, theta, row) for row in LEFT], axis=0)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(toy.network["theta"].grad.numpy(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_each_term_of_a_masked_transition_is_0_also_if_it_is_infinite(case: str) -> None:
    infinite = BATCH.reference_means.clone()
    infinite[0] = 1e200
    result = result_of(case, dataclasses.replace(BATCH, reference_means=infinite), Toy())
    for term in (*result.terms.values(), result.loss):
        assert [row for row in range(PAIRS) if term[row] != 0] == LEFT


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_a_round_without_the_masked_transitions(case: str) -> None:
    rows = torch.tensor(LEFT)
    fields = {field.name: getattr(BATCH, field.name) for field in dataclasses.fields(BATCH)}
    subset = {name: value[rows] for name, value in fields.items() if isinstance(value, torch.Tensor)}
    conditioning = {name: value[rows] for name, value in BATCH.conditioning.items()}
    summaries = []
    for batch in (BATCH, TransitionBatch(**{**subset, "conditioning": conditioning})):
        metrics = UpdateMetrics(num_steps=3, latent_elements=ELEMENTS)
        metrics.add_micro_batch(result_of(case, batch, Toy()), batch.steps)
        metrics.end_optimizer_step(torch.tensor(1.0))
        summaries.append(metrics.summary())
    masked, without = summaries
    assert masked.pop("masked_fraction") == 1 - len(LEFT) / PAIRS and without.pop("masked_fraction") == 0
    for summary in summaries:  # the largest before any update tells of sampler against learner, for every transition
        summary.pop("ratio/max_abs_log")
    assert masked == pytest.approx(without, rel=1e-12, nan_ok=True)

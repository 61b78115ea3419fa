"""AWM against its authors' formula in float64, on tiny models of diffusers' own classes, and by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_ddpo.common.recipe.registry import build
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.awm import AdvantageWeightedMatching
from ray_ddpo.learner.algorithms.denoising_likelihood import matching_log_prob
from tests.gradients import relative_error
from tests.noised_batches import FAMILIES, WEIGHTS, NoisedCase, gradient, noised_case, predict

WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> NoisedCase:
    return noised_case(request.param, tmp_path_factory.mktemp(request.param), tiny_model)


def authors_log_prob(error: Tensor, t: Tensor, weighting: str, power: float) -> Tensor:
    """Return `compute_log_prob_awm` of scxue/advantage_weighted_matching, train_sd3_awm.py, from the mean error."""
    log_prob = -error
    if weighting == "t":
        return log_prob * t
    if weighting == "t2":
        return log_prob * t**2
    if weighting == "huber":
        return -(torch.sqrt(-log_prob + 1e-10) - 1e-5) * t
    if weighting == "ghuber":
        floor = torch.tensor(1e-10, dtype=torch.float64)
        return -(torch.pow(-log_prob + 1e-10, power) - torch.pow(floor, power)) * t / power
    return log_prob


def authors_loss(case: NoisedCase, weighting: str, clip: float, kl: float, ema_kl: float) -> Tensor:
    """Return the loss of train_sd3_awm.py with loss_type `exp_first` and both `Uniform` KL terms."""
    batch, (predicted, target) = case.batch, predict(case.policy, case.batch)
    dims, wanted = tuple(range(1, target.ndim)), target.double()
    new, old = (
        authors_log_prob(((each.double() - wanted) ** 2).mean(dim=dims), case.levels, weighting, 0.25)
        for each in (predicted, batch.old_predictions)
    )
    ratio, advantages = torch.exp(new - old.detach()), torch.tensor(WEIGHTS, dtype=torch.float64)
    policy_loss = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip, 1 + clip))
    to_reference = ((predicted.double() - batch.reference_predictions.double()) ** 2).mean(dim=dims)
    to_average = ((predicted.double() - batch.old_predictions.double()) ** 2).mean(dim=dims)
    return (policy_loss + kl * to_reference + ema_kl * to_average).mean()


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_and_gradient_are_the_authors(case: NoisedCase, weighting: str) -> None:
    keys = {"clip_range": 1.0, "kl_coef": 1e-3, "behavior_kl_coef": 1.0}
    algorithm = build(ALGORITHMS, {"name": "awm", "weighting": weighting, **keys}, "algorithm")
    ours = algorithm.compute_loss(case.policy, case.batch)
    theirs = authors_loss(case, weighting, 1.0, 1e-3, 1.0)
    assert float(ours.loss.mean()) == pytest.approx(float(theirs), rel=1e-9)
    error = relative_error(gradient(case.policy, ours.loss.mean()), gradient(case.policy, theirs))
    print(f"{weighting}: relative error of the gradient {error:.1e}")
    assert error < 1e-6 and set(ours.terms) == {"policy", "kl", "behavior_kl"}


def test_a_tight_clip_range_holds_what_moved_too_far(case: NoisedCase) -> None:
    algorithm = AdvantageWeightedMatching(weighting="uniform", clip_range=1e-6)
    ours = algorithm.compute_loss(case.policy, case.batch)
    old = case.batch.old_errors
    moved = old - case.errors().detach()  # above 0: the image has become more likely
    held = (torch.tensor(WEIGHTS) * moved > 0) & (moved.abs() > 2e-6)
    assert held.any() and ours.clipped[held].all()
    for row in range(4):
        (slope,) = torch.autograd.grad(ours.loss[row], [next(iter(_trained(case)))], retain_graph=True)
        assert bool(slope.any()) == (not held[row]), row


def _trained(case: NoisedCase) -> list[Tensor]:
    return [each for each in case.policy.network.parameters() if each.requires_grad]


def test_before_the_first_update_the_ratio_is_exactly_one(case: NoisedCase) -> None:
    from dataclasses import replace

    fresh = replace(case.batch, old_errors=None, reference_predictions=None)
    loss = AdvantageWeightedMatching().compute_loss(case.policy, fresh).loss
    assert loss.tolist() == [-weight for weight in WEIGHTS]


def test_log_probs_by_hand() -> None:
    error, t = torch.tensor([0.16]), torch.tensor([0.5])
    found = {each: float(matching_log_prob(error, t, each, 0.25)) for each in WEIGHTINGS}
    expected = {"uniform": -0.16, "t": -0.08, "t2": -0.04, "huber": -0.5 * (0.4 - 1e-5)}
    expected["ghuber"] = -0.5 * (0.16**0.25 - 1e-10**0.25) / 0.25
    assert found == pytest.approx(expected, rel=1e-6)
    assert math.isclose(found["ghuber"], -2 * (0.6324555320 - 0.0031622777), rel_tol=1e-6)


def test_advantages_are_clipped_and_scaled_as_by_the_authors() -> None:
    """Check clamp(A, ± adv_clip_max) / adv_clip_max · advantage_max."""
    found = AdvantageWeightedMatching(advantage_clip=2.0, advantage_max=0.5).from_advantages(np.array([-3.0, 1.0, 9.0]))
    assert found.tolist() == [-0.5, 0.25, 0.5]

"""Clip ranges for each side, dual clip, GRPO-Guard and Flow-DPPO: by hand, refused keys, and the authors' gradients."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.diffusion.schedulers.denoising_steps import step_sizes
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import TransitionBatch
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.clip_bounds import ClipBounds
from ray_ddpo.learner.algorithms.flow_dppo import distrusted, trusted_surrogate
from ray_ddpo.learner.algorithms.grpo_guard import normalized_log_ratio
from ray_ddpo.learner.algorithms.losses import clipped_surrogate
from ray_ddpo.learner.algorithms.policy_gradient import RatioStep
from tests.accepted_page import assert_accepted
from tests.gradients import ONE_STEP, relative_error
from tests.learner.test_algorithms import BEHIND, Toy
from tests.reference import ddpo_reference as reference
from tests.rounds import components_with, learner_of, sample_round
from tests.tiny_families import policy_table, save_tiny_flux, save_tiny_sd3
from tests.tiny_pipeline import save_tiny_pipeline
from tests.tiny_policy import scatter


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.25, 2.0, -2.5, -2.5),  # within the larger range above 1
        (1.5, 2.0, -2.6, 0.0),  # beyond it: 1.3 · 2
        (0.75, -2.0, 1.6, 0.0),  # beyond the smaller range below 1: 0.8 · 2
        (2.5, -2.0, 5.0, 5.0),  # a bad action that became frequent is pushed back with all its ratio
        (4.0, -2.0, 6.0, 0.0),  # up to c = 3: max(min(4 · −2, 1.3 · −2), 3 · −2)
        (4.0, 2.0, -2.6, 0.0),  # a good action knows no dual clip
    ],
)
def test_bounds_of_each_side_and_the_dual_clip_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    bounds = ClipBounds(0.2, 0.3, 3.0)
    found = clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage]), bounds)
    found.sum().backward()
    assert (found.item(), log_prob.grad.item()) == pytest.approx((loss, gradient), abs=1e-6)
    ratios, advantages = torch.tensor([ratio]), torch.tensor([advantage])
    assert bool(bounds.outside(ratios)) == (not 0.8 <= ratio <= 1.3)
    assert bool(bounds.dual_clips(ratios, advantages)) == (ratio > 3 and advantage < 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clip_nats": 1.0, "clip_range_high": 1e-3}, "clip_range_high is 0.001, and the clip range is on the scale of "
         "clip_nats: give clip_nats_high, or clip_range instead of clip_nats"),
        ({"clip_nats_high": 2.0}, "clip_nats_high is 2.0, and the clip range is on the scale of clip_range: give "
         "clip_range_high, or clip_nats instead of clip_range"),
        ({"clip_range": 1e-3, "dual_clip_nats": 2.0}, "dual_clip_nats is 2.0, and the clip range is on the scale of "
         "clip_range: give dual_clip, or clip_nats instead of clip_range"),
        ({"clip_nats": 1.0, "dual_clip": 3.0}, "dual_clip is 3.0, and the clip range is on the scale of clip_nats: give "
         "dual_clip_nats, or clip_range instead of clip_nats"),
        ({"clip_range": 0.1, "clip_range_high": 0.3, "dual_clip": 1.2}, "dual_clip is 1.2 and the clip range above 1 "
         "ends at 1.3: the dual clip must begin above it, so give a larger dual_clip, or leave it out"),
        ({"clip_nats": 2.0, "dual_clip_nats": 1.0}, "dual_clip_nats is 1 and the clip range above 1 ends at 2: the dual "
         "clip must begin above it, so give a larger dual_clip_nats, or leave it out"),
        ({"dual_clip": 1.0}, "algorithm.dual_clip is 1.0"),
    ],
)  # fmt: skip
def test_contradictory_bounds_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build(ALGORITHMS, {"name": "grpo", **keys}, "algorithm")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "flow_dppo", "trust_region": 1e-5, "trust_region_nats": 1.0}, "give one of the two"),
        ({"name": "flow_dppo", "clip_range": 1e-4}, "clip_range"),
        ({"name": "grpo_guard", "clip_nats": 1.0}, "clip_nats"),
        ({"name": "grpo_guard", "clip_range": 0.5, "dual_clip": 1.2}, "the dual clip must begin above it"),
    ],
)
def test_keys_of_another_scale_are_refused(table: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build(ALGORITHMS, table, "algorithm")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_shares_of_held_transitions_are_metrics(tables: dict) -> None:
    """Check names and values after an update whose second optimizer step is beyond every bound."""
    bounds = {"name": "ddpo_is", "clip_nats": 1e-6, "clip_nats_high": 2e-6, "dual_clip_nats": 3e-6}
    trust = {"name": "flow_dppo", "trust_region_nats": 1e-9}
    for table, name in ((bounds, "dual_clip_fraction"), (trust, "trust_region_fraction")):
        keys = {"learner__learning_rate": 1e-3, "prompts__images_per_prompt": 2}
        components = components_with({**tables, "algorithm": table}, **keys)
        learner = learner_of(components)
        sampled = sample_round(components, learner.weights()[-1])
        metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
        assert metrics["optimizer_steps"] == 2 and 0 < metrics[name] < 0.5  # none of the first step's half


def hand_step(advantages: list[float]) -> tuple[RatioStep, Tensor]:
    """Return a step of one image with four elements: σ 0.5, Δμ (0.1, 0, −0.2, 0), and noise (1, 2, −1, 0)."""
    old, noise = torch.zeros(1, 1, 2, 2), torch.tensor([1.0, 2.0, -1.0, 0.0]).view(1, 1, 2, 2)
    mean, std = torch.tensor([0.1, 0.0, -0.2, 0.0]).view(1, 1, 2, 2), torch.tensor([0.5])
    reached = old + 0.5 * noise
    step = RatioStep(
        transition=Transition(mean, std),
        log_prob=Transition(mean, std).log_prob(reached),
        old_log_prob=Transition(old, std).log_prob(reached),
        old_means=old,
        weight=torch.ones(1),
        advantages=torch.tensor(advantages),
    )
    return step, noise


def test_the_normalized_log_ratio_is_the_mean_product_of_shift_and_noise() -> None:
    step, noise = hand_step([1.0])
    # (0.1 · 1 + 0.2 · 1) / 4, while log r = 0.075 / 0.5 − (0.01 + 0.04) / 4 / (2 · 0.25)
    assert float(normalized_log_ratio(step)) == pytest.approx(0.075, rel=1e-5)
    assert float(step.log_prob - step.old_log_prob) == pytest.approx(0.15 - 0.025, rel=1e-5)
    assert float((step.transition.mean * noise).mean()) == pytest.approx(0.075)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "drift", "held"),
    [
        (0.5, 1.0, 3.0, 1.0),  # a good action, made more likely, too far: held
        (-0.5, -1.0, 3.0, 1.0),  # a bad action, made less likely, too far: held
        (-0.5, 1.0, 3.0, 0.0),  # a good action that became rare comes back
        (0.5, -1.0, 3.0, 0.0),  # a bad action that became frequent comes back
        (0.5, 1.0, 2.0, 0.0),  # at the limit
        (-0.5, -1.0, 0.1, 0.0),  # near
        (0.0, 1.0, 3.0, 0.0),  # equally likely
        (0.5, 0.0, 3.0, 0.0),  # without an advantage
    ],
)
def test_the_trust_region_by_hand(log_ratio: float, advantage: float, drift: float, held: float) -> None:
    logs, advantages = torch.tensor([log_ratio], requires_grad=True), torch.tensor([advantage])
    found = distrusted(logs.detach(), torch.tensor([drift]), advantages, 2.0)
    assert found.tolist() == [held]
    loss = trusted_surrogate(logs, found, advantages)
    loss.sum().backward()
    expected = 0.0 if held else -advantage * math.exp(log_ratio)
    assert (loss.item(), logs.grad.item()) == pytest.approx((expected, expected), abs=1e-6)


def test_a_held_ratio_that_overflows_has_no_gradient() -> None:
    logs = torch.tensor([1000.0, 0.0], requires_grad=True)
    trusted_surrogate(logs, torch.tensor([1.0, 0.0]), torch.ones(2)).sum().backward()
    assert logs.grad.tolist() == [0.0, -1.0]


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(("name", "lag"), [("grpo_guard", 0), ("grpo_guard", 1), ("flow_dppo", 0)])
def test_the_ratio_is_exactly_1_on_the_current_policys_data(name: str, lag: int, tables: dict) -> None:
    """Check that the loss of the first optimizer step is minus the mean advantage, to the last bit of its parts."""
    table = {"name": name, "off_policy": {"ratio": "proximal" if lag else "behavior"}}
    keys = {"prompts__images_per_prompt": 2, "max_policy_lag": lag, "learner__micro_batch_size": 4}
    components = components_with({**tables, "algorithm": table}, **{**ONE_STEP, **keys})
    learner = learner_of(components)
    for round_index in range(lag + 1):
        sampled = sample_round(components, learner.weights()[0], round_index)
        metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    sizes = learner._policy.step_sizes() if name == "grpo_guard" else torch.ones(4)
    advantages = torch.from_numpy(np.float32(sampled.batch.advantages).clip(-5, 5))
    expected = -(advantages[:, None] / sizes[sampled.trajectories[0].steps]).double().mean()
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert metrics.get("clip_fraction", metrics.get("trust_region_fraction")) == 0


def test_the_pure_step_size_is_minus_dt_in_flow_matching_and_ddims_own_elsewhere(tmp_path: Path) -> None:
    sampling = SamplingTable(num_steps=4, guidance_scale=1.0)
    flow = build(POLICIES, policy_table("sd3", save_tiny_sd3(tmp_path / "sd3")), "policy").load(
        "cpu", sampling, "learner"
    )
    torch.testing.assert_close(flow.step_sizes(), flow.steps.sigmas - flow.steps.next_sigmas)
    model = save_tiny_pipeline(tmp_path / "sd")
    ddim = build(POLICIES, {"name": "stable_diffusion", "model": str(model)}, "policy").load("cpu", sampling, "learner")
    steps = ddim.steps
    for alpha, following, size in zip(steps.alphas_cumprod, steps.next_alphas_cumprod, step_sizes(steps), strict=True):
        moves = [
            reference.ddim_mean(*reference.clean_and_noise("epsilon", 0.0, output, float(alpha)), float(following), 0.0)
            for output in (0.0, 1.0)
        ]
        assert float(size) == pytest.approx(abs(moves[1] - moves[0]), rel=1e-4)


def test_a_family_without_step_sizes_is_refused_by_grpo_guard() -> None:
    class Bare(Toy):
        step_sizes = Policy.step_sizes

    with pytest.raises(ValueError, match="Bare has no step_sizes: give the policy `steps`"):
        build(ALGORITHMS, {"name": "grpo_guard"}, "algorithm").compute_loss(Bare(), BEHIND)


# What the authors compute, in float64 on the means of the networks.


@dataclasses.dataclass(frozen=True)
class Moved:
    """Transitions under two policies, in float64."""

    means: Tensor
    old_means: Tensor
    value: Tensor
    std: Tensor
    sqrt_dt: Tensor
    advantages: Tensor

    def mean_of(self, values: Tensor) -> Tensor:
        return values.mean(dim=tuple(range(1, values.ndim)))

    def log_ratio(self) -> Tensor:
        now, before = ((self.value - means) ** 2 for means in (self.means, self.old_means))
        return self.mean_of(before - now) / (2 * self.std**2)

    def guard_log_ratio(self) -> Tensor:
        """Return the logarithm of flow_grpo's ratio, of log-probs and ratio_mean_bias."""
        sigma_t = self.std / self.sqrt_dt
        bias = self.mean_of((self.means - self.old_means).pow(2)) / (2 * (self.sqrt_dt * sigma_t) ** 2)
        return (self.log_ratio() + bias) * (self.sqrt_dt * sigma_t)

    def kl(self) -> Tensor:
        return self.mean_of((self.means - self.old_means) ** 2) / (2 * self.std**2)


def authors_guard(moved: Moved, clip: float) -> Tensor:
    """Return each loss as in flow_grpo's GRPO-Guard, with the division by sqrt_dt ** 2."""
    ratio = torch.exp(moved.guard_log_ratio())
    unclipped, limited = -moved.advantages * ratio, -moved.advantages * torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
    return torch.maximum(unclipped, limited) / moved.sqrt_dt**2


def authors_dppo(moved: Moved, threshold: float) -> Tensor:
    """Return each loss as in UniRL's _flowdppo_kl_adv_loss, with the KL's mean over latent elements."""
    ratio, far = torch.exp(moved.log_ratio()), moved.kl() >= threshold
    removed = (far & (ratio > 1.0) & (moved.advantages > 0)) | (far & (ratio < 1.0) & (moved.advantages < 0))
    return torch.where(removed, 0.0, -moved.advantages * ratio)


# Of each algorithm: the key of its bound, what the bound limits, and the authors' loss.
CASES: dict[str, tuple[str, Callable[[Moved], Tensor], Callable[[Moved, float], Tensor]]] = {
    "grpo_guard": ("clip_range", lambda moved: moved.guard_log_ratio().abs(), authors_guard),
    "flow_dppo": ("trust_region", lambda moved: moved.kl(), authors_dppo),
}


def moved_batch(policy: Policy, sampling: SamplingTable) -> TransitionBatch:
    """Return transitions of two images, all at one step each, sampled before the policy moved."""
    trajectory = sample_trajectories(policy, ["a cat", "a dog"], [1, 2], sampling)
    count = trajectory.steps.shape[1]
    rows, places = torch.arange(2).repeat_interleave(count), torch.arange(count).repeat(2)
    conditioning = {
        name: value.expand(len(rows), *value.shape[1:]) if name.startswith("negative_") else value[rows]
        for name, value in trajectory.conditioning.items()
    }
    batch = TransitionBatch(
        conditioning,
        trajectory.steps[rows, places],
        trajectory.latents[rows, places],
        trajectory.next_latents[rows, places],
        trajectory.log_probs[rows, places],
        torch.tensor([2.0, -1.5, 0.5, -3.0] * count)[: len(rows)],
    )
    with torch.no_grad():
        means = policy.transition(batch.latents, batch.steps, batch.conditioning).mean
    scatter(policy.network, deviation=0.02, seed=4)
    return dataclasses.replace(batch, behavior_means=means)


def in_float64(network: torch.nn.Module) -> None:
    """Let the network compute in float64, so that its backward pass adds no rounding errors of its own."""

    def wide(value: object) -> object:
        if isinstance(value, dict):
            return {name: wide(each) for name, each in value.items()}
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def enter(module: torch.nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
        return tuple(wide(each) for each in given), {name: wide(each) for name, each in named.items()}

    network.double().register_forward_pre_hook(enter, with_kwargs=True)


def gradient(policy: Policy, loss: Tensor) -> dict[str, np.ndarray]:
    policy.network.zero_grad()
    loss.sum().backward(retain_graph=True)
    return {name: each.grad.double().numpy().copy() for name, each in trained_parameters(policy.network).items()}


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("make", [save_tiny_pipeline, save_tiny_sd3, save_tiny_flux], ids=["sd", "sd3", "flux"])
def test_losses_and_gradients_are_the_authors(make: Callable[[Path], Path], tmp_path: Path) -> None:
    assert_accepted("`grpo_guard` and `flow_dppo`")
    family = make.__name__.removeprefix("save_tiny_").replace("pipeline", "stable_diffusion")
    sampling = SamplingTable(num_steps=5, guidance_scale=1.0)
    policy = build(POLICIES, policy_table(family, make(tmp_path)), "policy").load("cpu", sampling, "sampler")
    scatter(policy.network)
    batch = moved_batch(policy, sampling)
    in_float64(policy.network)
    transition = policy.transition(batch.latents, batch.steps, batch.conditioning)
    sqrt_dt = policy.step_sizes()[batch.steps].double().sqrt()
    moved = Moved(
        transition.mean.double(),
        batch.behavior_means.double(),
        batch.next_latents.double(),
        transition.std.double(),
        sqrt_dt,
        batch.advantages.double(),
    )
    for name, (key, limited, authors) in CASES.items():
        bound = float(limited(moved).detach().median()) * 1.01  # half of the transitions are beyond it
        ours = build(ALGORITHMS, {"name": name, key: bound}, "algorithm").compute_loss(policy, batch)
        held = ours.clipped if ours.distrusted is None else ours.distrusted
        assert 0 < float(held.mean()) < 1
        theirs = authors(moved, bound)
        np.testing.assert_allclose(ours.loss.detach().numpy(), theirs.detach().numpy(), rtol=1e-6)
        error = relative_error(gradient(policy, ours.loss), gradient(policy, theirs))
        print(f"{family}, {name}: held {float(held.mean()):.2f}, relative error of the gradient {error:.1e}")
        assert error < 1e-6


def test_grpo_guards_recipe_and_flow_dppos_are_built(tables: dict) -> None:
    for name, columns in (("grpo_guard", {"behavior_means"}), ("flow_dppo", {"behavior_means", "reference_means"})):
        table = {"name": name, **({"kl_coef": 0.1} if name == "flow_dppo" else {})}
        recipe = Recipe.parse({**tables, "algorithm": table, "prompts": {"name": "animals", "images_per_prompt": 2}})
        assert build_components(recipe).algorithm.columns == columns


@pytest.mark.parametrize("name", ["grpo_guard", "flow_dppo"])
def test_masked_transitions_count_for_nothing_even_if_their_means_are_infinite(name: str) -> None:
    means = BEHIND.behavior_means.clone()
    means[3:] = 1e200
    batch = dataclasses.replace(BEHIND, behavior_means=means)
    losses = []
    for off_policy in ({}, {"max_drift_nats": 1.0}):
        table = {"name": name, "off_policy": off_policy, **({"clip_range": 0.1} if name == "grpo_guard" else {})}
        losses.append(build(ALGORITHMS, table, "algorithm").compute_loss(toy := Toy(), batch).loss)
    assert losses[1][:3].tolist() == losses[0][:3].tolist() and losses[1][3:].tolist() == [0.0, 0.0, 0.0]
    losses[1].sum().backward()
    assert toy.network["theta"].grad.isfinite().all() and toy.network["theta"].grad.any()

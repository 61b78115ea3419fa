"""DPO, DGPO and SFT on the best: against their authors' formulas in float64, by hand, and through the learner."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_ddpo.common.recipe.registry import build
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.dgpo import DirectGroupPreferenceOptimization
from ray_ddpo.learner.algorithms.dpo import DirectPreferenceOptimization
from ray_ddpo.learner.algorithms.group_ranks import best_and_worst, best_of_groups
from ray_ddpo.learner.algorithms.preference_losses import ComparedErrors, group_preference, pair_preference
from ray_ddpo.learner.round_data.epochs import by_groups, steps_of_epochs
from ray_ddpo.learner.round_data.noised_samples import training_items
from ray_ddpo.learner.round_data.transitions import round_transitions
from tests.gradients import ONE_STEP, gradient_of, relative_error
from tests.noised_batches import FAMILIES, WEIGHTS, NoisedCase, gradient, noised_case
from tests.rounds import SampledRound, components_with, learner_of, sample_round

SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> NoisedCase:
    return noised_case(request.param, tmp_path_factory.mktemp(request.param), tiny_model)


def authors_dpo(case: NoisedCase, beta: float) -> Tensor:
    """Return the loss of yifan123/flow_grpo's train_sd3_dpo.py, which is that of SalesforceAIResearch/DiffusionDPO."""
    theta, ref = case.errors(), case.errors(case.batch.reference_predictions)
    winners, losers = torch.tensor([0, 3]), torch.tensor([1, 2])
    w_diff, l_diff = theta[winners] - ref[winners], theta[losers] - ref[losers]
    return (-F.logsigmoid(-0.5 * beta * (w_diff - l_diff))).mean()


def authors_dgpo(case: NoisedCase, beta: float, clip: float, kl: float) -> Tensor:
    """Return the loss of Luo-Yihong/DGPO's train_sd3_dgpo.py, with groups of two images."""
    advantages = torch.tensor(WEIGHTS, dtype=torch.float64)
    dsm, old, ref = (case.errors(each) for each in (None, case.batch.old_predictions, case.batch.reference_predictions))
    ratio = torch.exp(-dsm + old)
    should_clip = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    dsm = torch.where(should_clip, dsm.detach(), dsm)
    sums = (advantages * beta * (dsm.detach() - ref) / 2).view(2, 2).sum(1)
    loss = (torch.sigmoid(sums).repeat_interleave(2).detach() * advantages * dsm).mean()
    predicted = case.policy.denoise(
        case.batch.clean_latents, case.batch.noise, case.batch.timesteps, case.batch.conditioning
    )[0]
    to_reference = (predicted.double() - case.batch.reference_predictions.double()).square().flatten(1).mean(1)
    return loss + kl * to_reference.mean()


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("beta", [2000.0, 100.0, 5.0])
def test_loss_and_gradient_of_dpo_are_the_authors(case: NoisedCase, beta: float) -> None:
    batch = dataclasses.replace(case.batch, weights=SIGNS)
    ours = DirectPreferenceOptimization(beta=beta).compute_loss(case.policy, batch)
    theirs = authors_dpo(case, beta)
    assert float(ours.loss.mean()) == pytest.approx(float(theirs), rel=1e-9)
    error = relative_error(gradient(case.policy, ours.loss.mean()), gradient(case.policy, theirs))
    print(f"dpo, beta {beta}: relative error of the gradient {error:.1e}")
    assert error < 1e-6


def test_loss_and_gradient_of_dgpo_are_the_authors(case: NoisedCase) -> None:
    algorithm = DirectGroupPreferenceOptimization(beta=10.0, clip_range=1e-4, kl_coef=0.02)
    ours = algorithm.compute_loss(case.policy, case.batch)
    theirs = authors_dgpo(case, 10.0, 1e-4, 0.02)
    assert float(ours.loss.mean()) == pytest.approx(float(theirs), rel=1e-9)
    error = relative_error(gradient(case.policy, ours.loss.mean()), gradient(case.policy, theirs))
    print(f"dgpo: relative error of the gradient {error:.1e}, {int(ours.clipped.sum())} of 4 clipped")
    assert error < 1e-6 and 0 < ours.clipped.sum() < 4


def test_known_slopes_give_the_same_rows_as_complete_groups(case: NoisedCase) -> None:
    batch = dataclasses.replace(case.batch, weights=SIGNS)
    algorithm = DirectPreferenceOptimization(beta=5.0)
    whole = algorithm.compute_loss(case.policy, batch)
    with torch.no_grad():
        errors = case.errors()
    coupling = algorithm.coupling(errors, batch.reference_errors, None, SIGNS, batch.groups)
    apart = algorithm.compute_loss(case.policy, dataclasses.replace(batch, coupling=coupling))
    torch.testing.assert_close(apart.loss, whole.loss)
    slopes = [gradient(case.policy, each.loss.sum()) for each in (apart, whole)]
    assert relative_error(*slopes) < 1e-6


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_a_pair_by_hand() -> None:
    """The chosen error fell by 0.1 and the rejected one rose by 0.2: inside = 10/2 · 0.3 = 1.5."""
    compared = ComparedErrors(errors=row(0.9, 1.2), reference=row(1.0, 1.0), old=row(1, 1), signals=row(1, -1))
    found = pair_preference(compared, 10.0)
    assert found.loss.tolist()[0] == pytest.approx([math.log(1 + math.exp(-1.5))] * 2)
    weight = 1 / (1 + math.exp(1.5))  # σ(−1.5)
    assert found.slopes.tolist()[0] == pytest.approx([10 * weight, -10 * weight])
    assert found.agrees.tolist() == [[1, 1]] and not found.clipped.any()
    turned = pair_preference(dataclasses.replace(compared, signals=row(-1, 1)), 10.0)
    assert turned.loss.tolist()[0] == pytest.approx([math.log(1 + math.exp(1.5))] * 2) and not turned.agrees.any()
    tied = pair_preference(dataclasses.replace(compared, errors=compared.reference), 10.0)
    assert tied.agrees.tolist() == [[0.5, 0.5]]


def test_a_group_by_hand() -> None:
    """Σ A (e − e_ref) β / 3 = (1 · −0.3 + 0 + −1 · 0.3) · 5 / 3 = −1, and the last image is outside the clip range."""
    compared = ComparedErrors(
        errors=row(0.7, 1.0, 1.3), reference=row(1, 1, 1), old=row(0.7, 1.0, 1.0), signals=row(1, 0, -1)
    )
    found = group_preference(compared, 5.0, 0.1)
    weight = 1 / (1 + math.e)
    assert found.slopes.tolist()[0] == pytest.approx([weight, 0, 0])
    assert found.loss.tolist()[0] == pytest.approx([0.7 * weight, 0, -1.3 * weight])
    assert found.clipped.tolist() == [[0, 0, 1]] and found.agrees.all()
    assert group_preference(compared, 5.0, 1000.0).slopes.tolist()[0] == pytest.approx([weight, 0, -weight])


def test_slopes_are_the_derivative_of_a_pairs_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, reference = torch.rand(2, 4, 2, generator=generator, dtype=torch.float64)
    signals = torch.tensor([[1.0, -1.0], [-1.0, 1.0]] * 2, dtype=torch.float64)
    errors.requires_grad_()
    compared = ComparedErrors(errors=errors, reference=reference, old=reference, signals=signals)
    found = pair_preference(compared, 7.0)
    (expected,) = torch.autograd.grad(found.loss.sum(), errors)
    torch.testing.assert_close(found.slopes.detach(), expected, rtol=1e-12, atol=1e-12)


def test_best_and_worst_of_groups() -> None:
    rewards = np.array([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.0, 4.0, 4.0])
    assert best_and_worst(rewards, 3).tolist() == [-1, 1, 0, 0, 0, 0, -1, 1, 0]
    assert best_of_groups(rewards, 3, 1).tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert best_of_groups(rewards, 3, 2).tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1]


def test_groups_stay_complete_in_the_order_of_their_first_image() -> None:
    assert by_groups(np.array([4, 0, 5, 3, 1, 2]), 2).tolist() == [4, 5, 0, 1, 2, 3]


KEYS: dict[str, Any] = {**ONE_STEP, "prompts__images_per_prompt": 4, "sampling__batch_size": 8}


def prepared(tables: dict, name: str, **keys: Any) -> tuple[Any, SampledRound]:
    """Return a recipe's components, and a round whose signals are the algorithm's of random rewards."""
    tables = {**tables, "algorithm": {"name": name, **keys.pop("algorithm", {})}}
    components = components_with(tables, **{**KEYS, "learner__batch_size": 8, "learner__micro_batch_size": 8, **keys})
    sampled = sample_round(components, learner_of(components).weights()[-1])
    rewards = np.random.default_rng(5).normal(size=8)
    prompts = [prompt.text for report in sampled.batch.reports for prompt in report.task.prompts]
    _, advantages = components.algorithm.compute_advantages({}, prompts, rewards, 4)
    batch = dataclasses.replace(sampled.batch, advantages=components.algorithm.from_advantages(advantages))
    return components, SampledRound(batch, sampled.trajectories)


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(("name", "sizes"), [("dpo", (4, 2, 1)), ("dgpo", (8, 4, 2))])
def test_every_micro_batch_size_has_the_same_gradient(name: str, sizes: tuple[int, ...], tables: dict) -> None:
    """Groups are complete in the first micro-batches, and parted in the last."""
    found = []
    for size in sizes:
        components, sampled = prepared(tables, name, learner__micro_batch_size=size, algorithm={"beta": 20.0})
        learner = learner_of(components)
        metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
        assert 0 <= metrics["preference_accuracy"] <= 1
        found.append((gradient_of(learner), metrics["loss"]))
    for other, loss in found[1:]:
        assert relative_error(other, found[0][0]) < 1e-5 and loss == pytest.approx(found[0][1], rel=1e-4)


def test_a_group_shares_noise_and_timestep_and_its_optimizer_step(tables: dict) -> None:
    components, sampled = prepared(tables, "dpo", learner__batch_size=2, learner__micro_batch_size=2)
    transitions = round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu")
    items = training_items(components.algorithm, sampled.batch, transitions, 1000, 4)
    (epoch,) = steps_of_epochs(components.recipe, components.algorithm, sampled.batch, items)
    assert len(epoch) == 2 == components.algorithm.steps_per_round(components.recipe)
    for step in epoch:
        assert len(set((step[:, 0] // 4).tolist())) == 1
        batch = items.batch(step)
        assert sorted(batch.weights.tolist()) == [-1, 1] and batch.groups.unique().numel() == 1
        assert batch.timesteps.unique().numel() == 1 and torch.equal(batch.noise[0], batch.noise[1])
        assert not torch.equal(batch.clean_latents[0], batch.clean_latents[1])
    assert not torch.equal(items.batch(epoch[0]).noise, items.batch(epoch[1]).noise)


def test_a_dropped_group_of_an_odd_number_parts_no_pair(tables: dict) -> None:
    """Its images take the places of one pair, so that the steps of all other groups stay as they are."""
    sizes = {"prompts__images_per_prompt": 3, "sampling__batch_size": 3, "sampling__batches_per_round": 4}
    keys = {**sizes, "learner__batch_size": 2, "learner__micro_batch_size": 2}
    components = components_with({**tables, "algorithm": {"name": "dpo", "beta": 20.0}}, **keys)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    steps = {}
    for dropped in range(-1, 4):
        signals = np.tile([1.0, 0.0, -1.0], 4)
        images = tuple(range(3 * dropped, 3 * dropped + 3)) if dropped >= 0 else ()
        signals[list(images)] = np.nan
        batch = dataclasses.replace(sampled.batch, advantages=signals, dropped=images)
        items = training_items(
            components.algorithm, batch, round_transitions(sampled.trajectories, signals, "cpu"), 1000, 3
        )
        (epoch,) = steps_of_epochs(components.recipe, components.algorithm, batch, items)
        steps[dropped] = [{image // 3 for image in step[:, 0].tolist()} for step in epoch]
        metrics, _ = learner_of(components).update(batch, *sampled.trajectories)
        assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert all(len(groups) == 1 for groups in steps[-1])
    assert all(steps[gone] == [groups - {gone} for groups in steps[-1]] for gone in range(4))


def test_sft_trains_on_the_best_images_only(tables: dict) -> None:
    components, sampled = prepared(
        tables, "sft", learner__batch_size=2, learner__micro_batch_size=1, algorithm={"best": 2}
    )
    items = training_items(
        components.algorithm,
        sampled.batch,
        round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu"),
        1000,
    )
    (epoch,) = steps_of_epochs(components.recipe, components.algorithm, sampled.batch, items)
    rewards = np.random.default_rng(5).normal(size=8)
    best = {image for group in (0, 4) for image in (group + np.argsort(-rewards[group : group + 4])[:2]).tolist()}
    assert {image for step in epoch for image in step[:, 0].tolist()} == best
    assert components.algorithm.images_learned_from(components.recipe) == 4


def test_a_dropped_group_leaves_no_steps_of_few_images_behind(tables: dict) -> None:
    """Eight groups have one best image each, so that there are two steps of four, with and without a dropped group."""
    keys = {"sampling__batches_per_round": 4, "learner__batch_size": 4, "learner__micro_batch_size": 4}
    components, sampled = prepared(tables, "sft", **keys)
    size = components.recipe.images_per_round
    signals = np.tile([1.0, 0.0, 0.0, 0.0], size // 4)
    assert size == 32
    for dropped in ((), (8, 9, 10, 11)):
        signals[list(dropped)] = np.nan
        batch = dataclasses.replace(sampled.batch, advantages=signals, dropped=dropped)
        items = round_transitions(sampled.trajectories, signals, "cpu")
        (epoch,) = steps_of_epochs(components.recipe, components.algorithm, batch, items)
        assert sorted(len(set(step[:, 0].tolist())) for step in epoch) == ([3, 4] if dropped else [4, 4])


@pytest.mark.parametrize(
    ("table", "keys", "message"),
    [
        ({"name": "dpo"}, {"prompts__images_per_prompt": 1}, "compares the images of a group.* is 1: give at least 2"),
        ({"name": "dpo"}, {"learner__batch_size": 1}, "has 1 images .* 'dpo' compares 2 images of a group"),
        ({"name": "dgpo"}, {"learner__batch_size": 2}, "has 2 images .* 'dgpo' compares 4 images of a group"),
        ({"name": "dgpo", "advantages": {"kind": "round"}}, {}, "algorithm.advantages.kind is 'round': dgpo compares"),
        ({"name": "sft", "best": 4}, {}, "algorithm.best is 4 and prompts.images_per_prompt 4: sft trains"),
        (
            {"name": "dgpo"},
            {"aggregation__kind": "advantages", "reward__floor": -3.0},
            "aggregation.kind is 'advantages', the reward jpeg_compressibility has a floor, and the algorithm is dgpo",
        ),
        ({"name": "dpo", "ema_decay_max": 0.9}, {}, "ema_decay_max is 0.9 and ema_decay_growth 0, with which"),
        ({"name": "awm", "ema_decay_flat": 3}, {}, "ema_decay_flat is 3 and ema_decay_growth 0, with which"),
        (
            {"name": "awm", "weighting": "t", "ghuber_power": 0.5},
            {},
            "ghuber_power is 0.5 and weighting 't', which has",
        ),
        ({"name": "dpo"}, {"policy__train": "full"}, 'needs reference_errors: .* of dpo, reference = "behavior"'),
        ({"name": "awm"}, {"prompts__images_per_prompt": 1}, "kind is 'group' and prompts.images_per_prompt 1"),
        (
            {"name": "diffusion_nft", "shared_noise": True, "advantages": {"kind": "round"}},
            {"prompts__images_per_prompt": 1},
            "shared_noise is true, and prompts.images_per_prompt is 1, so that no images share noise: give at least 2",
        ),
    ],
)
def test_recipes_that_have_no_groups_to_compare_are_refused(
    table: dict, keys: dict[str, Any], message: str, tables: dict
) -> None:
    with pytest.raises(ValueError, match=message):
        components_with({**tables, "algorithm": table}, **{**KEYS, "learner__micro_batch_size": 1, **keys})


def test_the_behavior_policy_may_be_the_reference(case: NoisedCase) -> None:
    """At the first step after sampling the loss is then log 2, and its slope β/2 on each row."""
    algorithm = build(ALGORITHMS, {"name": "dpo", "reference": "behavior", "beta": 4.0}, "algorithm")
    assert algorithm.columns == {"old_errors"}
    fresh = dataclasses.replace(case.batch, weights=SIGNS, old_errors=None, reference_errors=None)
    loss = algorithm.compute_loss(case.policy, fresh).loss
    assert loss.tolist() == pytest.approx([math.log(2)] * 4)
    ours = gradient(case.policy, loss.sum())
    expected = gradient(case.policy, (2.0 * SIGNS.double() * case.errors()).sum())
    assert relative_error(ours, expected) < 1e-6

"""Gradients of a reward through the last denoising steps: against finite differences, and truncated by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.lora.adapters import reference_policy, trained_parameters
from ray_ddpo.common.diffusion.memory.live_bytes import peak_bytes
from ray_ddpo.common.diffusion.rollout import start_steps
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.learner.algorithms.alignprop import AlignProp
from ray_ddpo.learner.algorithms.draft import DRaFT
from ray_ddpo.learner.algorithms.refl import ReFL
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient
from ray_ddpo.learner.optimization.micro_batch import made_up_batch
from ray_ddpo.learner.restart_check import RestartDiffers
from ray_ddpo.learner.round_data.restarts import restarts_of
from ray_ddpo.learner.round_data.transitions import round_transitions
from tests.gradients import relative_error
from tests.restarts import (
    detached_by_hand,
    double_policy,
    moved_policy,
    sampled,
    smooth_reward,
    with_reward,
)
from tests.rounds import components_with, learner_of, sample_round
from tests.tiny_families import policy_table, save_tiny_sd3
from tests.tiny_policy import scatter

PROMPTS, SEEDS = ["a cat", "a horse", "a cat"], [11, 12, 13]


def gradient_tables(tables: dict, name: str = "draft", **sampling: object) -> dict:
    """Return the small recipe with an algorithm on the reward's gradient."""
    return {
        **tables,
        "sampling": {**tables["sampling"], "backprop_steps": 2, **sampling},
        "reward": {"name": "colourfulness"},
        "algorithm": {"name": name},
        "learner": {**tables["learner"], "micro_batch_size": 4},
    }


def gradients(policy, loss: torch.Tensor) -> dict[str, np.ndarray]:
    policy.network.zero_grad(set_to_none=True)
    loss.sum().backward()
    return {name: each.grad.double().numpy().copy() for name, each in trained_parameters(policy.network).items()}


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [(DRaFT(), 1), (DRaFT(), 2), (DRaFT(), 3), (ReFL(margin=2.0), 2)],
    ids=["1", "2", "3", "refl"],
)
def test_the_gradient_is_that_of_finite_differences_through_three_steps(
    algorithm: RewardGradient, steps: int, tiny_model: Path
) -> None:
    policy = double_policy(tiny_model)
    sampling = SamplingTable(num_steps=3, guidance_scale=1.0, backprop_steps=steps)
    _, batch = sampled(policy, PROMPTS, SEEDS, sampling)
    scatter(policy.network, seed=5)  # the learner has other weights by now, and the start stays
    algorithm = with_reward(algorithm)
    slopes = gradients(policy, algorithm.compute_loss(policy, batch).loss)
    parameters, generator = trained_parameters(policy.network), torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = {name: torch.randn(each.shape, generator=generator).double() for name, each in parameters.items()}
        losses = []
        for change in (1e-5, -2e-5, 1e-5):  # forth, back, and to the middle
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.add_(direction[name], alpha=change)
                losses.append(float(algorithm.compute_loss(policy, batch).loss.sum()))
        expected = (losses[0] - losses[1]) / 2e-5
        found = sum(float((slopes[name] * direction[name].numpy()).sum()) for name in parameters)
        assert expected != 0 and found == pytest.approx(expected, rel=1e-6), steps


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("steps", "window"), [(1, None), (3, range(1, 2)), (4, None), ((1, 4), None), ((1, 4), range(3, 4))]
)
def test_truncation_is_a_detached_latent_and_reproduces_the_samplers_images(
    steps: int | tuple[int, int], window: range | None, tiny_model: Path
) -> None:
    sampling = SamplingTable(num_steps=4, guidance_scale=3.0, backprop_steps=steps)
    policy = moved_policy(tiny_model, sampling)
    trajectory, batch = sampled(policy, PROMPTS, SEEDS, sampling, window)
    algorithm = with_reward(DRaFT(recompute=False))
    final, _ = algorithm.denoised(policy, batch)
    torch.testing.assert_close(final.detach(), trajectory.final_latents, rtol=0, atol=2e-5)
    ours = gradients(policy, -algorithm.rewards_of(policy, final, batch))
    reference = detached_by_hand(policy, PROMPTS, SEEDS, list(batch.starts), window)
    pixels = (policy.vae.decode(policy._unscaled(reference)).sample / 2 + 0.5).clamp(0, 1)
    theirs = gradients(policy, -smooth_reward(pixels, PROMPTS, []))
    assert relative_error(ours, theirs) < 1e-5


def test_refl_is_the_papers_single_prediction_with_a_margin(tiny_model: Path) -> None:
    """ReLU(2 − r) of x̂0 = (x_t − √(1−ᾱ) ε) / √ᾱ at each image's own step, as in THUDM/ImageReward, ReFL.py, but for
    that code's timestep, which is the step's number there, and 10³ times the grad_scale."""
    sampling = SamplingTable(num_steps=4, guidance_scale=3.0, backprop_steps=(1, 3))
    policy = moved_policy(tiny_model, sampling)
    _, batch = sampled(policy, PROMPTS, SEEDS, sampling)
    found = with_reward(ReFL(loss_scale=1.0, margin=2.0)).compute_loss(policy, batch)
    ours, latents = gradients(policy, found.loss), []
    for row, step in enumerate(batch.starts):
        alpha = policy.pipeline.scheduler.alphas_cumprod[policy.steps.timesteps[step]]
        conditioning = {name: value[row : row + 1] for name, value in batch.conditioning.items()}
        x = batch.latents[row : row + 1]
        noise = policy.predict(x, policy.steps.timesteps[step].view(1), conditioning)
        latents.append((x - (1 - alpha) ** 0.5 * noise) / alpha**0.5)
    pixels = (policy.vae.decode(policy._unscaled(torch.cat(latents))).sample / 2 + 0.5).clamp(0, 1)
    expected = torch.relu(-smooth_reward(pixels, PROMPTS, []) + 2)
    torch.testing.assert_close(found.loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert relative_error(ours, gradients(policy, expected)) < 1e-5
    flat = with_reward(ReFL(margin=-100.0)).compute_loss(policy, batch)
    assert not flat.loss.any() and not any(gradient.any() for gradient in gradients(policy, flat.loss).values())


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("algorithm", "steps", "window"),
    [
        (DRaFT(kl_coef=0.3), (1, 3), None),
        (AlignProp(kl_coef=0.3, recompute=False), 3, range(0)),
        (ReFL(kl_coef=0.3, loss_scale=2.0), (1, 3), None),
    ],
    ids=["draft", "alignprop, no noise", "refl"],
)
def test_the_penalty_is_the_mean_shift_of_predictions_with_its_gradient(
    algorithm: RewardGradient, steps: int | tuple[int, int], window: range | None, tiny_model: Path
) -> None:
    """Against DRaFT+'s loop by hand: the pretrained model's predictions at the same latents, without gradient."""
    sampling = SamplingTable(num_steps=4, guidance_scale=3.0, backprop_steps=steps)
    policy = moved_policy(tiny_model, sampling)
    _, batch = sampled(policy, PROMPTS, SEEDS, sampling, window)
    found = with_reward(algorithm).compute_loss(policy, batch)
    ours, expected = gradients(policy, found.loss), []
    for row, start in enumerate(batch.starts):
        rows, latents, shifts = {name: value[row : row + 1] for name, value in batch.conditioning.items()}, None, []
        latents = batch.latents[row : row + 1]
        for step in range(start, start + 1 if isinstance(algorithm, ReFL) else 4):
            at = policy.steps.timesteps[step].view(1)
            predicted = policy.predict(latents, at, rows)
            with torch.no_grad(), reference_policy(policy.network):
                pretrained = policy.predict(latents, at, rows)
            shifts.append((predicted - pretrained).square().mean())
            noise = batch.noise[step][row : row + 1] if step in batch.noise else None
            transition = policy.transition(latents, torch.tensor([step]), rows, noise is not None)
            latents = transition.mean if noise is None else transition.sample(noise)
        expected.append(torch.stack(shifts).mean())
    shift = torch.stack(expected)
    torch.testing.assert_close(found.prediction_shift, shift.detach(), rtol=1e-4, atol=0)
    assert found.prediction_shift.min() > 0
    without = with_reward(algorithm.model_copy(update={"kl_coef": 0.0}))
    theirs = gradients(policy, without.compute_loss(policy, batch).loss)
    penalty = gradients(policy, 0.3 * shift)
    assert relative_error(ours, {name: theirs[name] + penalty[name] for name in theirs}) < 1e-4
    assert relative_error(ours, theirs) > 1e-3, "the penalty is no rounding"


def test_without_a_pretrained_model_there_is_no_penalty(tables: dict) -> None:
    changed = gradient_tables(tables)
    changed["algorithm"] |= {"kl_coef": 0.1}
    with pytest.raises(ValueError, match=r"algorithm.kl_coef is 0.1 and policy.train 'full': the pretrained model"):
        components_with({**changed, "policy": {**changed["policy"], "train": "full"}})
    learner = learner_of(components := components_with(changed))
    taken = sample_round(components, learner.weights()[-1])
    metrics, _ = learner.update(taken.batch, *taken.trajectories)
    assert metrics["learner/prediction_shift"] > 0


def test_alignprop_aims_at_a_target_where_it_has_one(tiny_model: Path) -> None:
    """|r − target| · loss_coeff of mihirp1998/AlignProp (main.py, aesthetic_loss_fn); without a target TRL's −r."""
    sampling = SamplingTable(num_steps=4, guidance_scale=3.0, backprop_steps=2)
    policy = moved_policy(tiny_model, sampling)
    _, batch = sampled(policy, PROMPTS, SEEDS, sampling)
    reward = with_reward(AlignProp()).compute_loss(policy, batch).reward
    target = float(reward.sort().values[1]) + 1e-3  # between the images' rewards
    aimed = with_reward(AlignProp(target=target, loss_scale=0.01)).compute_loss(policy, batch)
    torch.testing.assert_close(aimed.loss.detach(), 0.01 * (reward - target).abs())


def test_draft_lv_denoises_its_own_image_with_other_noise(tables: dict) -> None:
    changed = gradient_tables(tables, "draft_lv", backprop_steps=1)
    components = components_with({**changed, "learner": {**changed["learner"], "micro_batch_size": 6}})
    learner = learner_of(components)
    taken = sample_round(components, learner.weights()[-1])
    transitions = round_transitions(taken.trajectories, taken.batch.advantages, "cpu")
    restarts = restarts_of(3, taken.batch, transitions, learner._policy, components.recipe.sampling)
    batch = restarts.batch(torch.tensor([[5, 0], [5, 1], [5, 2], [6, 1]]))
    assert batch.starts == (3, 3, 3, 3)
    alpha, clean = learner._policy.steps.alphas_cumprod[3], transitions.gather("final_latents", torch.tensor([5, 6]))
    own = transitions.gather("start_latents", torch.tensor([5]))[0]
    assert torch.equal(batch.latents[0], own)
    noise = (batch.latents[1:] - alpha.sqrt() * clean[[0, 0, 1]]) / (1 - alpha).sqrt()
    assert (noise.flatten(1).std(1) - 1).abs().max() < 0.2 and noise.flatten(1).corrcoef().triu(1).abs().max() < 0.3
    again = restarts.batch(torch.tensor([[6, 1], [5, 2]]))
    assert torch.equal(again.latents, batch.latents[[3, 2]]) and torch.equal(again.noise[3], batch.noise[3][[3, 2]])
    metrics, _ = learner.update(taken.batch, *taken.trajectories)
    assert metrics["optimizer_steps"] == 2 and metrics["restart_check/grey_levels"] < 0.01
    with pytest.raises(ValueError, match="noised images are denoised by the last step alone"):
        components_with({**changed, "sampling": {**changed["sampling"], "backprop_steps": 2}})


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("name", ["alignprop", "draft", "refl"])
def test_flow_models_take_their_deterministic_last_step_too(name: str, tables: dict, tmp_path: Path) -> None:
    changed = gradient_tables(tables, name, backprop_steps=(1, 2), guidance_scale=1.0)
    family = policy_table("sd3", save_tiny_sd3(tmp_path / "sd3"))
    changed["algorithm"] |= {"margin": 1e3} if name == "refl" else {}
    learner = learner_of(components := components_with({**changed, "policy": family}))
    taken = sample_round(components, learner.weights()[-1])
    metrics, _ = learner.update(taken.batch, *taken.trajectories)
    assert metrics["restart_check/grey_levels"] < 0.01 and metrics["grad_norm"] > 0


def test_the_sampled_number_of_steps_is_a_function_of_the_images_seed() -> None:
    sampling, seeds = SamplingTable(num_steps=50, backprop_steps=(3, 12)), list(range(400))
    starts = start_steps(sampling, seeds)
    assert torch.equal(starts[37:40], start_steps(sampling, seeds[37:40]))
    counts = np.bincount(50 - starts.numpy(), minlength=13)
    assert counts[:3].sum() == 0 and (counts[3:13] > 20).all() and counts.sum() == 400


def test_recomputing_activations_keeps_the_bits_and_saves_memory(tiny_model: Path) -> None:
    sampling = SamplingTable(num_steps=3, guidance_scale=3.0, backprop_steps=3)
    policy = moved_policy(tiny_model, sampling)
    _, batch = sampled(policy, PROMPTS[:1], SEEDS[:1], sampling)
    found, peaks = [], []
    for recompute in (False, True):
        algorithm = with_reward(DRaFT(recompute=recompute))
        peaks.append(peak_bytes(lambda of=algorithm: gradients(policy, of.compute_loss(policy, batch).loss)))
        found.append(gradients(policy, algorithm.compute_loss(policy, batch).loss))
    assert all((found[0][name] == found[1][name]).all() for name in found[0])
    print(f"peak bytes: {peaks[0]:,} kept, {peaks[1]:,} re-computed")
    assert peaks[1] < peaks[0] / 2


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("steps", "latents_dtype"),
    [({}, "float32"), ({"sde_window": 1}, "float16"), ({}, "bfloat16"), ({"deterministic": True}, "float32")],
    ids=str,
)
def test_a_learner_makes_the_samplers_images_and_raises_the_reward(
    steps: dict, latents_dtype: str, tables: dict
) -> None:
    changed = gradient_tables(tables, latents_dtype=latents_dtype, **steps)
    learner = learner_of(components := components_with(changed))
    taken = sample_round(components, learner.weights()[-1])
    transitions = round_transitions(taken.trajectories, taken.batch.advantages, "cpu")
    restarts = restarts_of(1, taken.batch, transitions, learner._policy, components.recipe.sampling)
    rows = restarts.batch(torch.tensor([[image, 0] for image in range(8)]))

    def reward() -> float:
        with torch.no_grad():
            return float(learner._algorithm.compute_loss(learner._policy, rows).reward.mean())

    before = reward()
    metrics, _ = learner.update(taken.batch, *taken.trajectories)
    assert metrics["restart_check/grey_levels"] < 0.01
    assert metrics["loss"] == pytest.approx(-metrics["learner/reward"]) and metrics["optimizer_steps"] == 2
    assert reward() > before


def test_a_learner_that_makes_other_images_ends_the_run(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(components := components_with(gradient_tables(tables)))
    taken = sample_round(components, learner.weights()[-1])
    whole = type(learner._policy).decode_pixels
    calls = []

    def decode(policy, latents):
        calls.append(1)
        return whole(policy, latents) * (0.9 if len(calls) == 1 else 1.0)

    monkeypatch.setattr(type(learner._policy), "decode_pixels", decode)
    with pytest.raises(RestartDiffers, match=r"grey levels on average, over algorithm.restart_tolerance = 1"):
        learner.update(taken.batch, *taken.trajectories)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": {"num_steps": 4}}, "sampling.backprop_steps is not given"),
        (
            {"reward": {"name": "jpeg_compressibility"}},
            r"'jpeg_compressibility' has none: those that have one are \['br",
        ),
        ({"reward": {"name": "function", "path": "os:getcwd"}}, "'function' has none"),
        ({"algorithm": {"name": "ddpo_is"}}, "learns without the reward's gradient"),
        ({"aggregation": {"kind": "z_score"}}, "leave out aggregation.kind = 'z_score'$"),
        ({"reward": {"name": "brightness", "floor": 1}}, "leave out the floor 1 of the reward 'brightness'$"),
        (
            {"sampling": {"num_steps": 4, "backprop_steps": 2, "kl_reward": 0.1}},
            "sampling.kl_reward is 0.1 and algorithm.name 'draft'.*leave kl_reward out",
        ),
        ({"sampling": {"num_steps": 4, "backprop_steps": 5}}, "at most num_steps"),
        ({"sampling": {"num_steps": 4, "backprop_steps": [1, 5]}}, "at most num_steps"),
        ({"sampling": {"num_steps": 4, "backprop_steps": [3, 2]}}, "the fewest and the most of them"),
        ({"sampling": {"num_steps": 4, "backprop_steps": 2, "cache_interval": 2}}, "cache_interval 2: the learner rep"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(changes: dict, words: str, tables: dict) -> None:
    with pytest.raises(ValueError, match=words):
        components_with({**gradient_tables(tables), **changes})


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("recompute", [True, False])
def test_the_predicted_memory_is_that_of_a_counted_step(recompute: bool, tables: dict) -> None:
    changed = gradient_tables(tables, backprop_steps=4)
    changed["algorithm"] |= {"recompute": recompute}
    components = components_with(changed)
    learner = learner_of(components)
    policy, algorithm = learner._policy, learner._algorithm
    sizes = components.policy.sizes(components.recipe.sampling, "cpu")
    predicted = algorithm.learner_sizes(sizes).learner
    algorithm.compute_loss(policy, made_up_batch(policy, algorithm, sizes, 1)).loss.sum().backward()  # makes gradients
    peaks = []
    for rows in (1, 4):
        batch = made_up_batch(policy, algorithm, sizes, rows)
        peaks.append(peak_bytes(lambda of=batch: algorithm.compute_loss(policy, of).loss.sum().backward()))
    counted = (peaks[1] - peaks[0]) / 3
    print(f"bytes per restart: {predicted.each:,.0f} predicted, {counted:,.0f} counted")
    assert 0.8 * counted < predicted.each < 1.6 * counted

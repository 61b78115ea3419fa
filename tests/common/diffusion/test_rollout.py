"""Sampling and scoring trajectories: the first ratio is exactly 1, and noise belongs to the image."""

import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion, StableDiffusionPolicy
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.diffusion.rollout import (
    evaluation_window,
    image_noise,
    refuse_window_without_noise,
    sample_trajectories,
    score,
    trained_steps,
)
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import DTYPES, Trajectory
from tests.tiny_pipeline import save_tiny_pipeline
from tests.tiny_policy import SAMPLING, tiny_policy

PROMPTS, SEEDS = ["a cat", "a dog", "a cat", "a cow"], [11, 12, 13, 14]
CLIP_RANGE = 1e-4  # the lineage's


def sampling(**changes: object) -> SamplingTable:
    return SamplingTable(**{**SAMPLING.model_dump(), **changes})


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> StableDiffusionPolicy:
    return tiny_policy(tiny_model)


@pytest.fixture(scope="module")
def trajectory(policy: StableDiffusionPolicy) -> Trajectory:
    return sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING)


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("network", "stored"),
    [
        ("float32", "float32"),
        ("float32", "float16"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_a_learner_with_equal_weights_gives_every_step_the_samplers_own_bits(
    network: str, stored: str, tiny_model: Path
) -> None:
    sampled = sample_trajectories(
        tiny_policy(tiny_model, dtype=network), PROMPTS, SEEDS, SAMPLING.model_copy(update={"latents_dtype": stored})
    )
    arrived = pickle.loads(pickle.dumps(sampled))
    assert arrived.latents.dtype == DTYPES[stored]
    again = score(tiny_policy(tiny_model, "learner", dtype=network), arrived)
    assert torch.equal(again, sampled.log_probs)
    assert sampled.log_probs.isfinite().all()


def test_latents_rounded_after_scoring_would_not_give_a_ratio_of_one(
    policy: StableDiffusionPolicy, trajectory: Trajectory
) -> None:
    # Storing the same trajectory in bfloat16 only afterwards would not be exact.
    rounded = Trajectory(
        trajectory.conditioning,
        trajectory.prompt_index,
        trajectory.steps,
        trajectory.log_probs,
        trajectory.latents.bfloat16(),
        trajectory.next_latents.bfloat16(),
        trajectory.final_latents,
    )
    assert (score(policy, rounded) - trajectory.log_probs).abs().max() > CLIP_RANGE


def test_transitions_in_other_batches_stay_within_a_tenth_of_the_clip_range(
    policy: StableDiffusionPolicy, trajectory: Trajectory
) -> None:
    pairs = [(image, place) for place in range(4) for image in range(4)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    largest = 0.0
    for size in (2, 3, 8):
        for first in range(0, len(order), size):
            part = [pairs[index] for index in order[first : first + size]]
            images, places = (torch.tensor(column) for column in zip(*part, strict=True))
            rows = select_rows(trajectory.conditioning, trajectory.prompt_index[images])
            with torch.no_grad():
                transition = policy.transition(
                    trajectory.latents[images, places], trajectory.steps[images, places], rows
                )
            difference = (
                transition.log_prob(trajectory.next_latents[images, places]) - trajectory.log_probs[images, places]
            )
            largest = max(largest, float(difference.abs().max()))
    print(f"largest |log ratio| in other batches: {largest:.1e}")
    assert largest <= CLIP_RANGE / 10


def test_an_images_noise_and_trajectory_do_not_depend_on_its_batch(
    policy: StableDiffusionPolicy, trajectory: Trajectory
) -> None:
    alone = sample_trajectories(policy, PROMPTS[2:3], SEEDS[2:3], SAMPLING)
    assert torch.equal(alone.latents[0, 0], trajectory.latents[2, 0])
    torch.testing.assert_close(alone.next_latents[0], trajectory.next_latents[2], rtol=1e-5, atol=1e-5)


def test_noise_is_a_function_of_the_seed_and_another_seed_gives_other_noise() -> None:
    first, again, other = (torch.stack(list(islice(image_noise([seed], (4, 8, 8)), 3))) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any(dim=(1, 2, 3)).all()
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 0.2


def test_the_same_prompt_and_seed_give_the_same_bits_again(
    policy: StableDiffusionPolicy, trajectory: Trajectory
) -> None:
    again = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING)
    assert torch.equal(again.next_latents, trajectory.next_latents)
    assert torch.equal(again.log_probs, trajectory.log_probs)


def test_each_distinct_prompt_is_encoded_once_and_every_image_knows_its_own(trajectory: Trajectory) -> None:
    assert trajectory.prompt_index.tolist() == [0, 1, 0, 2]
    assert len(trajectory.conditioning["prompt_embeds"]) == 3
    assert len(trajectory.conditioning["negative_prompt_embeds"]) == 1


def test_a_step_leaves_the_latents_that_the_next_step_enters(trajectory: Trajectory) -> None:
    assert torch.equal(trajectory.next_latents[:, :-1], trajectory.latents[:, 1:])
    assert torch.equal(trajectory.final_latents, trajectory.next_latents[:, -1])
    assert trajectory.steps.tolist() == [[0, 1, 2, 3]] * 4


def test_the_last_step_to_the_clean_image_is_sampled_but_not_trained_on(tmp_path: Path) -> None:
    model = save_tiny_pipeline(tmp_path / "model", set_alpha_to_one=True)
    sampled = sample_trajectories(tiny_policy(model), PROMPTS[:2], SEEDS[:2], SAMPLING)
    assert sampled.steps.tolist() == [[0, 1, 2]] * 2
    assert sampled.log_probs.isfinite().all() and sampled.log_probs.shape == (2, 3)
    assert not torch.equal(sampled.final_latents, sampled.next_latents[:, -1])


def test_an_images_seed_alone_chooses_distinct_steps_in_order() -> None:
    noisy = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    kept = trained_steps(noisy, 4, list(range(200)))
    assert kept.shape == (200, 4)
    assert (kept[:, 1:] > kept[:, :-1]).all() and set(kept.flatten().tolist()) == set(noisy)
    assert torch.equal(trained_steps(noisy, 4, [17, 3]), kept[[17, 3]])
    # each of 10 steps is kept by 80 of 200 images, give or take √(200 · 0.4 · 0.6) = 7
    counts = torch.bincount(kept.flatten(), minlength=11)[noisy]
    assert (counts - 80).abs().max() < 4 * 7


def test_training_on_fewer_steps_leaves_the_trajectory_unchanged(
    policy: StableDiffusionPolicy, trajectory: Trajectory
) -> None:
    some = sample_trajectories(policy, PROMPTS, SEEDS, sampling(timestep_fraction=0.5))
    assert some.steps.shape == (4, 2) and len({tuple(row) for row in some.steps.tolist()}) > 1
    rows = torch.arange(4)[:, None]
    assert torch.equal(some.latents, trajectory.latents[rows, some.steps])
    assert torch.equal(some.next_latents, trajectory.next_latents[rows, some.steps])
    assert torch.equal(some.log_probs, trajectory.log_probs[rows, some.steps])
    assert torch.equal(some.final_latents, trajectory.final_latents)


def test_trained_steps_that_differ_between_images_still_have_a_ratio_of_one(policy: StableDiffusionPolicy) -> None:
    some = sample_trajectories(policy, PROMPTS, SEEDS, sampling(timestep_fraction=0.5))
    assert (score(policy, pickle.loads(pickle.dumps(some))) - some.log_probs).abs().max() <= CLIP_RANGE / 100


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_trajectory_ends_where_diffusers_own_pipeline_ends(guidance_scale: float, tiny_model: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    five_steps = sampling(num_steps=5, guidance_scale=guidance_scale)
    policy = StableDiffusion(model=str(tiny_model)).load("cpu", five_steps, "sampler")
    ours = sample_trajectories(policy, PROMPTS, SEEDS, five_steps)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        eta=1.0,
        generator=generators,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours.final_latents, theirs, rtol=1e-4, atol=1e-4)


def test_each_image_trains_on_a_fraction_of_steps_chosen_by_its_seed(policy: StableDiffusionPolicy) -> None:
    whole = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING)
    half = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING.model_copy(update={"timestep_fraction": 0.5}))
    assert half.steps.shape == (4, 2) and len({tuple(steps) for steps in half.steps.tolist()}) > 1
    assert torch.equal(half.final_latents, whole.final_latents)
    for image, steps in enumerate(half.steps.tolist()):
        assert torch.equal(half.latents[image], whole.latents[image, steps])
        assert torch.equal(half.next_latents[image], whole.next_latents[image, steps])
        assert torch.equal(half.log_probs[image], whole.log_probs[image, steps])
    assert torch.equal(trained_steps([0, 1, 2, 3], 2, SEEDS[1:2])[0], half.steps[1])
    torch.testing.assert_close(score(policy, pickle.loads(pickle.dumps(half))), half.log_probs, rtol=0, atol=1e-6)


def test_the_last_steps_can_be_sampled_without_training_on_them(policy: StableDiffusionPolicy) -> None:
    whole = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING)
    early = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING.model_copy(update={"skip_last_steps": 1}))
    assert early.steps.tolist() == [[0, 1, 2]] * 4
    assert torch.equal(early.final_latents, whole.final_latents)
    assert torch.equal(early.next_latents, whole.next_latents[:, :3])
    one = sample_trajectories(
        policy, PROMPTS, SEEDS, SAMPLING.model_copy(update={"skip_last_steps": 2, "timestep_fraction": 0.5})
    )
    assert one.steps.shape == (4, 1) and int(one.steps.max()) <= 1


def test_only_the_windows_steps_are_stochastic_and_stored(policy: StableDiffusionPolicy) -> None:
    sampled = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, range(1, 3))
    assert sampled.steps.tolist() == [[1, 2]] * 4 and sampled.latents.shape[1] == 2
    assert sampled.log_probs.shape == (4, 2) and sampled.log_probs.isfinite().all()
    arrived = pickle.loads(pickle.dumps(sampled))
    whole = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING)
    latent = whole.final_latents.numel() * 4
    assert whole.num_bytes - sampled.num_bytes == 2 * latent + 2 * 4 * (8 + 4)  # two latents, two steps with log-probs
    assert arrived.latents.untyped_storage().nbytes() == 3 * latent
    assert torch.equal(score(policy, arrived), sampled.log_probs)


def test_outside_the_window_steps_are_diffusers_deterministic_steps(policy: StableDiffusionPolicy) -> None:
    """Compute the trajectory by hand: DDIM steps of diffusers, with eta 1 and noise inside the window only."""
    window = range(2, 3)
    sampled = sample_trajectories(policy, PROMPTS[:1], SEEDS[:1], SAMPLING, window)
    theirs = DDIMScheduler.from_pretrained(policy.config.model, subfolder="scheduler")
    theirs.set_timesteps(SAMPLING.num_steps)
    noise = list(islice(image_noise(SEEDS[:1], policy.latent_shape), SAMPLING.num_steps + 1))
    embeds = torch.cat([policy.encode([""])["prompt_embeds"], policy.encode(PROMPTS[:1])["prompt_embeds"]])
    latents = noise[0]
    with torch.no_grad():
        for step, timestep in enumerate(theirs.timesteps):
            plain, prompted = policy.network(latents.repeat(2, 1, 1, 1), timestep, embeds).sample.chunk(2)
            output = plain + SAMPLING.guidance_scale * (prompted - plain)
            eta = 1.0 if step in window else 0.0
            extra = {"variance_noise": noise[step + 1]} if eta else {}
            latents = theirs.step(output, int(timestep), latents, eta=eta, **extra).prev_sample
            if step == 1:
                torch.testing.assert_close(sampled.latents[0, 0], latents[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampled.final_latents, latents, rtol=1e-4, atol=1e-5)


def test_evaluation_images_are_deterministic_if_the_recipe_has_a_window(policy: StableDiffusionPolicy) -> None:
    assert evaluation_window(SAMPLING) is None
    window = evaluation_window(sampling(sde_window=2))
    sampled = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, window)
    assert sampled.steps.shape == (4, 0) and sampled.latents.shape[:2] == (4, 0)
    other_noise = sample_trajectories(policy, PROMPTS, [seed + 100 for seed in SEEDS], SAMPLING, window)
    assert not torch.equal(sampled.final_latents, other_noise.final_latents)  # they begin elsewhere


def test_a_window_that_can_cover_a_deterministic_step_is_refused(tmp_path: Path) -> None:
    policy = tiny_policy(save_tiny_pipeline(tmp_path, set_alpha_to_one=True))
    with pytest.raises(ValueError, match=r"can cover the steps \[3\], .* with skip_last_steps = 1"):
        refuse_window_without_noise(policy, sampling(sde_window=2))
    refuse_window_without_noise(policy, sampling(sde_window=2, skip_last_steps=1))
    refuse_window_without_noise(policy, sampling())

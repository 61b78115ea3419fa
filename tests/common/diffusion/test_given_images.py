"""Given images as latents: the inverse of decoding in every family, and the trajectories that end in them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.families.flux2 import squares, unsquared
from ray_ddpo.common.diffusion.given_trajectories import given_trajectories
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.diffusion.rollout import image_noise, score
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.tiny_families import FROM_OUTSIDE, MAKERS, VIDEO, policy_table
from tests.tiny_policy import scatter

pytestmark = pytest.mark.rotated(every=5)

SAMPLING = SamplingTable(num_steps=4, guidance_scale=1.0, deterministic=True)
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module", params=[name for name in MAKERS if name not in VIDEO])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiffusersPolicy:
    model = MAKERS[request.param](tmp_path_factory.mktemp("model"))
    loaded = build(POLICIES, policy_table(request.param, model), "policy").load("cpu", SAMPLING, "sampler")
    scatter(loaded.network)
    return loaded


def images_for(policy: DiffusersPolicy) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (len(SEEDS), *policy.image_size(), 3), generator=generator, dtype=torch.uint8)


def test_scaling_is_the_inverse_of_what_the_decoder_is_given(policy: DiffusersPolicy) -> None:
    latents = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(policy._scaled(policy._unscaled(latents)), latents, rtol=1e-12, atol=1e-12)


def test_latents_are_sampled_from_the_encoders_posterior(policy: DiffusersPolicy) -> None:
    """diffusers' own posterior with the same noise, whose decoder then gets the unscaled sample back.

    The tiny Stable Diffusion has an AutoencoderTiny and SANA an AutoencoderDC, which have no posterior: their latents
    are taken as they are.
    """
    images = images_for(policy)
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    found = policy.encode_images(images, noise)
    assert found.shape == noise.shape and found.dtype == torch.float32
    with torch.no_grad():
        pixels = images.permute(0, 3, 1, 2) / 255 * 2 - 1
        of_videos = type(policy.vae).__name__ == "AutoencoderKLQwenImage"  # an image is a video of one frame
        encoded = policy.vae.encode(pixels.unsqueeze(2) if of_videos else pixels)
    has_posterior = hasattr(encoded, "latent_dist")
    found_noise = noise.unsqueeze(2) if of_videos else noise
    in_squares = type(policy.vae).__name__ == "AutoencoderKLFlux2"
    found_noise = unsquared(noise) if in_squares else found_noise
    wanted = encoded.latent_dist.mean + encoded.latent_dist.std * found_noise if has_posterior else encoded[0]
    wanted = squares(wanted) if in_squares else wanted
    torch.testing.assert_close(policy._unscaled(found), wanted.view_as(found), rtol=1e-4, atol=1e-5)
    without_noise = policy.encode_images(images, torch.zeros_like(noise))
    assert torch.allclose(found, without_noise) != has_posterior


def test_a_given_trajectory_ends_in_the_image_and_proves_its_weights(policy: DiffusersPolicy) -> None:
    images = images_for(policy)
    prompts = ["a cat", "a dog", "a cat"]
    trajectory = given_trajectories(policy, prompts, SEEDS, SAMPLING, images.numpy())
    noise = image_noise(SEEDS, policy.latent_shape)
    start, _, of_posterior = next(noise), next(noise), next(noise)
    assert torch.equal(trajectory.final_latents, policy.encode_images(images, of_posterior))
    assert torch.equal(trajectory.latents[:, 0], policy.initial_latents(start))
    assert trajectory.prompt_index.tolist() == [0, 1, 0] and trajectory.steps.tolist() == [[0]] * 3
    assert torch.equal(score(policy, trajectory), trajectory.log_probs)
    scatter(policy.network, 7)
    assert not torch.isclose(score(policy, trajectory), trajectory.log_probs, rtol=1e-6, atol=0).any()


def test_the_embedded_models_images_survive_encoding_and_decoding() -> None:
    config: PolicyConfig = build(
        POLICIES, {"name": "stable_diffusion", "model": "tiny_animals"}, "policy", PolicyConfig
    )
    policy = config.load("cpu", SamplingTable(num_steps=15, guidance_scale=3.0), "sampler")
    from ray_ddpo.common.diffusion.rollout import sample_trajectories

    sampled = sample_trajectories(policy, ["cat", "horse"], [1, 2], SamplingTable(num_steps=15, guidance_scale=3.0))
    images = policy.decode(sampled.final_latents)
    again = policy.decode(policy.encode_images(images, torch.zeros_like(sampled.final_latents)))
    error = np.abs(images.numpy().astype(int) - again.numpy().astype(int)).mean()
    print(f"mean absolute error of a pixel: {error:.2f} of 255")
    assert error < 8


@pytest.mark.parametrize("family", FROM_OUTSIDE)
def test_a_family_without_an_encoder_says_so(family: str, tmp_path: Path) -> None:
    config: PolicyConfig = build(POLICIES, policy_table(family, FROM_OUTSIDE[family](tmp_path)), "policy", PolicyConfig)
    assert not config.takes_images
    policy = config.load("cpu", SAMPLING.model_copy(update={"deterministic": False}), "sampler")
    with pytest.raises(ValueError, match="has no encode_images"):
        policy.encode_images(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), torch.zeros(1, *policy.latent_shape))

"""The pipeline of random weights loads, samples and learns in half precision, and is reproducible."""

from pathlib import Path

import pytest
import torch

from benchmarks.random_stable_diffusion import save_random_pipeline
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.tables import SamplingTable

SAMPLING = SamplingTable(num_steps=2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sampled_images_are_neither_flat_nor_overflowed(dtype: str, tmp_path: Path) -> None:
    model = save_random_pipeline(tmp_path / "model", "tiny")
    policy = StableDiffusion(model=str(model), dtype=dtype).load("cpu", SAMPLING, "sampler")
    trajectory = sample_trajectories(policy, ["a cat", "a cat with a very long name"], [1, 2], SAMPLING)
    images = policy.decode(trajectory.final_latents)
    assert images.shape == (2, 16, 16, 3)
    assert images.float().std() > 10
    assert trajectory.log_probs.isfinite().all()
    assert trajectory.conditioning["prompt_embeds"].shape == (2, 77, 16)


def test_equal_calls_write_equal_weights(tmp_path: Path) -> None:
    first, second = (save_random_pipeline(tmp_path / name, "tiny", torch.bfloat16) for name in ("a", "b"))
    for file in first.rglob("*.safetensors"):
        assert file.read_bytes() == (second / file.relative_to(first)).read_bytes()

"""SDXL gets the size of its images as in diffusers' pipeline, whatever the decoder's scale factor."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.accepted_page import assert_accepted
from tests.tiny_decoders import AUTOENCODER
from tests.tiny_families import policy_table, save_tiny_sdxl


class Heard(Exception):
    """Raised when the UNet is called."""


@pytest.mark.parametrize("scale", [2, 8])
def test_size_ids_are_those_of_the_pipeline(scale: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    assert_accepted("an SDXL whose decoder's scale factor is not 8")
    model = save_tiny_sdxl(tmp_path)
    if scale == 2:
        shutil.rmtree(model / "vae")
        AutoencoderKL(**AUTOENCODER, scaling_factor=0.13).save_pretrained(model / "vae")
    told: list[torch.Tensor] = []

    def listening(*_: Any, added_cond_kwargs: dict[str, torch.Tensor], **__: Any) -> None:
        told.append(added_cond_kwargs["time_ids"])
        raise Heard

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, local_files_only=True, add_watermarker=False)
    monkeypatch.setattr(pipeline.unet, "forward", listening)
    with pytest.raises(Heard):
        pipeline("a cat", num_inference_steps=2, guidance_scale=1.0)
    policy = build(POLICIES, policy_table("sdxl", model), "policy").load("cpu", SamplingTable(num_steps=2), "sampler")
    monkeypatch.setattr(policy.network, "forward", listening)
    rows = {name: value for name, value in policy.encode(["a cat"]).items() if not name.startswith("negative_")}
    with pytest.raises(Heard):
        policy._predict(torch.zeros(1, *policy.latent_shape), torch.tensor([1]), rows)
    assert told[0].tolist() == told[1].tolist() == [[8.0 * scale, 8.0 * scale, 0, 0, 8.0 * scale, 8.0 * scale]]

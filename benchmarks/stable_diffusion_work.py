"""Count the floating-point operations of one row of the network on torch's meta device."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion


def work_of_a_row(config: StableDiffusion) -> dict[str, float]:
    """Count a forward pass, and a forward and backward pass for adapters only, without gradients of frozen weights."""
    from diffusers import UNet2DConditionModel

    from ray_ddpo.common.diffusion.lora.start import make_trainable

    sizes = config.part_config("unet")
    with torch.device("meta"):
        network: Any = UNet2DConditionModel.from_config(sizes)
        latents = torch.randn(1, sizes.get("in_channels", 4), *[sizes["sample_size"]] * 2)
        inputs = latents, torch.zeros(1), torch.randn(1, 77, sizes["cross_attention_dim"])
    make_trainable(network, "lora", config.lora)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        network(*inputs, return_dict=False)
    with FlopCounterMode(display=False) as both:
        network(*inputs, return_dict=False)[0].sum().backward()
    return {"forward_flops": forward.get_total_flops(), "both_flops": both.get_total_flops()}

"""The registry of model families, which encode prompts, take steps, and decode images. One file and one line each."""

from ray_ddpo.common.recipe.registry import Registry

POLICIES: Registry = {
    "stable_diffusion": "ray_ddpo.common.diffusion.families.stable_diffusion:StableDiffusion",
    "sdxl": "ray_ddpo.common.diffusion.families.sdxl:SDXL",
    "sd3": "ray_ddpo.common.diffusion.families.sd3:SD3",
    "flux": "ray_ddpo.common.diffusion.families.flux:Flux",
    "qwen_image": "ray_ddpo.common.diffusion.families.qwen_image:QwenImage",
    "pixart_sigma": "ray_ddpo.common.diffusion.families.pixart_sigma:PixArtSigma",
    "sana": "ray_ddpo.common.diffusion.families.sana:Sana",
}

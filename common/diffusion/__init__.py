"""The registry of model families, each of which encodes prompts, steps, and decodes images: one file and one line each."""

from ray_ddpo.common.recipe.registry import Registry

POLICIES: Registry = {
    "stable_diffusion": "ray_ddpo.common.diffusion.families.stable_diffusion:StableDiffusion",
    "sdxl": "ray_ddpo.common.diffusion.families.sdxl:SDXL",
    "sd3": "ray_ddpo.common.diffusion.families.sd3:SD3",
    "flux": "ray_ddpo.common.diffusion.families.flux:Flux",
}

"""The room of model families: how one encodes prompts, steps, and decodes pictures. One file a family, one line here."""

from common.registry import Room

POLICIES: Room = {
    "stable_diffusion": "common.diffusion.policy_stable_diffusion:StableDiffusion",
    "sdxl": "common.diffusion.policy_sdxl:SDXL",
    "sd3": "common.diffusion.policy_sd3:SD3",
    "flux": "common.diffusion.policy_flux:Flux",
}

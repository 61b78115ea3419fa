"""The room of model families: how one encodes prompts, steps, and decodes pictures. One file a family, one line here."""

from common.registry import Room

POLICIES: Room = {
    "stable_diffusion": "common.diffusion.policy_stable_diffusion:StableDiffusion",
}

"""A Stable Diffusion whose decoder ends its process at the image whose latents have the mean in `killer.txt`."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion, StableDiffusionPolicy
from ray_ddpo.common.diffusion.policy import Role
from ray_ddpo.common.recipe.tables import SamplingTable

FILE = "killer.txt"


class DeadlyPolicy(StableDiffusionPolicy):
    """A policy with the mean of the fatal latents in `killer`."""

    killer: float

    def decode(self, latents: Tensor) -> Tensor:
        if any(abs(float(each.mean()) - self.killer) < 1e-7 for each in latents):
            os.abort()
        return super().decode(latents)


class Deadly(StableDiffusion):
    """The configuration; the fatal mean is in a file beside the model."""

    def make_policy(self, pipeline: Any, device: str, sampling: SamplingTable, role: Role) -> DeadlyPolicy:
        policy = super().make_policy(pipeline, device, sampling, role)
        policy.__class__ = DeadlyPolicy
        assert isinstance(policy, DeadlyPolicy)
        policy.killer = float((Path(self.model) / FILE).read_text())
        return policy

"""A model family on a cluster whose machines have different files under one path."""

from typing import Any

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.policy import Role
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.recipe.tables import SamplingTable


class OnTwoMachines(StableDiffusion):
    """A configuration whose learner reads the files at `model` and whose samplers read those at `elsewhere`."""

    elsewhere: str

    def _seen_by(self, role: Role) -> "OnTwoMachines":
        return self if role == "learner" else self.model_copy(update={"model": self.elsewhere})

    def files_of(self, role: Role) -> tuple[Weights, ...]:
        return StableDiffusion.files_of(self._seen_by(role), role)

    def load(self, device: str, sampling: SamplingTable, role: Role) -> Any:
        return StableDiffusion.load(self._seen_by(role), device, sampling, role)

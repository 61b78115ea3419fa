"""FLUX.2 with a reference image, whose tokens the network reads beside the latents: as `flux2` otherwise."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.editing_policy import EditingPolicy
from ray_ddpo.common.diffusion.families.flux2 import Flux2Config, Flux2Dev, Flux2Policy, Klein
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.policy import Conditioning


class Flux2EditPolicy(EditingPolicy, Flux2Policy):
    """A loaded pipeline of FLUX.2 that gets one reference image a prompt."""

    def _encode_input(self, pixels: Float[Tensor, "1 3 H2 W2"], mask: Float[Tensor, "1 1 H2 W2"]) -> Conditioning:
        return {"input_latents": self._latents_of(pixels)}


class ReadsImage(Flux2Config):
    """What a family adds for the reference image, which has the output's size."""

    reads_inputs: ClassVar[tuple[str, ...]] = ("image",)
    policy_class: ClassVar[type[DiffusersPolicy]] = Flux2EditPolicy

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return super().conditioning_shapes(configs) | {"input_latents": self.latent_shape(configs["transformer"])}


class Flux2Edit(ReadsImage, Flux2Dev):
    """FLUX.2-dev, which edits an input image."""


class Flux2KleinEdit(ReadsImage, Klein):
    """FLUX.2-klein, which edits an input image."""

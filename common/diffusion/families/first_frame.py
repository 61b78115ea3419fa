"""What families of Wan from images share: the input image is the first frame, whose latents the transformer reads."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import NetworkCall
from ray_ddpo.common.diffusion.editing_policy import EditingPolicy
from ray_ddpo.common.diffusion.families.wan import Wan, WanPolicy
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.recipe.tables import SamplingTable


def call_transformer(
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    input_condition: Tensor,
    input_states: Tensor | None = None,
) -> Tensor:
    """Return the transformer's velocity prediction per row. What it reads of the image is behind the latents' channels."""
    return network(
        hidden_states=torch.cat([latents, input_condition], dim=1),
        timestep=timesteps,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_image=input_states,
        return_dict=False,
    )[0]


class FirstFramePolicy(EditingPolicy, WanPolicy):
    """A loaded WanImageToVideoPipeline, whose input image is the first frame."""

    config: "FirstFrame"

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        """Encode one prompt, as the pipeline of text to video does."""
        from diffusers import WanPipeline

        # As this pipeline's own `encode_prompt` does, which fails where ftfy is not installed; the other one does not.
        def states(text: str) -> Tensor:
            length = self.config.max_sequence_length
            return WanPipeline._get_t5_prompt_embeds(
                self.pipeline, text, max_sequence_length=length, device=torch.device(self.device)
            )

        rows = {"prompt_embeds": states(prompt)}
        return rows | ({"negative_prompt_embeds": states(self.negative_prompt or "")} if with_negative else {})

    def _encode_input(self, pixels: Float[Tensor, "1 3 H2 W2"], mask: Float[Tensor, "1 1 H2 W2"]) -> Conditioning:
        frames = torch.zeros(1, 3, self.num_frames, *pixels.shape[-2:], device=pixels.device, dtype=pixels.dtype)
        frames[:, :, 0] = pixels
        latents = self._latents_of(frames)
        known = torch.zeros_like(latents[:, :1]).repeat(1, self.config.frames_per_latent, 1, 1, 1)
        known[:, :, 0] = 1
        return {"input_condition": torch.cat([known, latents], dim=1)}


class FirstFrame(Wan):
    """Keys of Wan from images: the input image is the first frame."""

    reads_inputs: ClassVar[tuple[str, ...]] = ("image",)
    pipeline_class: ClassVar[str] = "WanImageToVideoPipeline"
    pipeline_packages: ClassVar[tuple[str, ...]] = ("ftfy",)

    def taken_channels(self, latent_channels: int) -> int:
        return 2 * latent_channels + self.frames_per_latent

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        channels = network_config["out_channels"] or network_config["in_channels"]
        return super().latent_shape(network_config | {"in_channels": channels})

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        channels, *rest = self.latent_shape(configs["transformer"])
        return super().conditioning_shapes(configs) | {"input_condition": (self.frames_per_latent + channels, *rest)}

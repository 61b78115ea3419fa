"""Wan 2.2 5B from images (Wan Team 2025): the first frame of latents is the image's, and its tokens have timestep 0."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.first_frame import FirstFrame, FirstFramePolicy
from ray_ddpo.common.diffusion.families.wan_published import WAN_22_5B
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.recipe.tables import SamplingTable


def with_first_frame(latents: Float[Tensor, "B C F H W"], frame: Float[Tensor, "B C 1 H W"]) -> Tensor:
    """Return latents whose first frame is another one."""
    return torch.cat([frame.to(latents.dtype), latents[:, :, 1:]], dim=2)


def call_transformer(
    network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, input_frame: Tensor
) -> Tensor:
    """Return the transformer's velocity prediction per row. The first frame is the input image's, without noise."""
    frames, height, width = latents.shape[2:]
    _, rows, columns = network.config.patch_size
    of_frames = torch.stack([torch.zeros_like(timesteps), *[timesteps] * (frames - 1)], dim=1)
    return network(
        hidden_states=with_first_frame(latents, input_frame),
        timestep=of_frames.repeat_interleave((height // rows) * (width // columns), dim=1),
        encoder_hidden_states=prompt_embeds,
        return_dict=False,
    )[0]


class WanTextImagePolicy(FirstFramePolicy):
    """A loaded WanImageToVideoPipeline whose transformer takes a timestep for each token."""

    config: "WanTextImage"

    def _encode_input(self, pixels: Float[Tensor, "1 3 H2 W2"], mask: Float[Tensor, "1 1 H2 W2"]) -> Conditioning:
        return {"input_frame": self._latents_of(pixels.unsqueeze(2))[:, :, :1]}  # which repeats the frame

    def _guided(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, both: bool
    ) -> Float[Tensor, "B C F H W"]:
        # What the network says of the first frame is not used, so it must not move a log-prob.
        output = super()._guided(latents, timesteps, conditioning, both)
        return with_first_frame(output, torch.zeros_like(output[:, :, :1]))

    def denoise(
        self,
        clean_latents: Float[Tensor, "B C F H W"],
        noise: Float[Tensor, "B C F H W"],
        timesteps: Int[Tensor, "B"],
        conditioning: Conditioning,
    ) -> tuple[Float[Tensor, "B C F H W"], Float[Tensor, "B C F H W"]]:
        predicted, target = super().denoise(clean_latents, noise, timesteps, conditioning)
        return with_first_frame(predicted, target[:, :, :1]), target

    def finished(self, latents: Float[Tensor, "B C F H W"], conditioning: Conditioning) -> Float[Tensor, "B C F H W"]:
        return with_first_frame(latents, conditioning["input_frame"])


class WanTextImage(FirstFrame):
    """Wan 2.2 5B, image to video: the input image is the first frame."""

    policy_class: ClassVar[type[DiffusersPolicy]] = WanTextImagePolicy
    index_classes: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline")  # published for text to video
    published: ClassVar[dict[str, Configs]] = {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": WAN_22_5B}

    def taken_channels(self, latent_channels: int) -> int:
        return latent_channels

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        channels, _, height, width = self.latent_shape(configs["transformer"])
        texts = {"prompt_embeds": super().conditioning_shapes(configs)["prompt_embeds"]}
        return texts | {"input_frame": (channels, 1, height, width)}

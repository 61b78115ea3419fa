"""Wan 2.1 image to video (Wan Team 2025): the transformer reads the first frame's latents and an image encoder's states."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.editing_policy import EditingPolicy
from ray_ddpo.common.diffusion.families.published_parts import WIDE_ADAPTERS
from ray_ddpo.common.diffusion.families.wan import Wan, WanPolicy
from ray_ddpo.common.diffusion.families.wan_published import WAN_21_I2V_14B
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.input_images import InputImages, blank_inputs
from ray_ddpo.common.recipe.tables import SamplingTable


def call_transformer(
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    input_condition: Tensor,
    input_states: Tensor,
) -> Tensor:
    """Return the transformer's velocity prediction per row. What it reads of the image is behind the latents' channels."""
    return network(
        hidden_states=torch.cat([latents, input_condition], dim=1),
        timestep=timesteps,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_image=input_states,
        return_dict=False,
    )[0]


class WanImagePolicy(EditingPolicy, WanPolicy):
    """A loaded WanImageToVideoPipeline, whose input image is the first frame."""

    config: "WanImage"

    @torch.no_grad()
    def encode(self, prompts: list[str], inputs: InputImages | None = None) -> Conditioning:
        inputs = inputs or blank_inputs(len(prompts), self.image_size())
        rows = super().encode(prompts, inputs)
        with self._at_work(self.pipeline.image_encoder):
            # One image at a time: in a batch, its last bits would depend on the other images.
            images = map(Image.fromarray, inputs.pixels)
            states = [self.pipeline.encode_image(image, self.device) for image in images]
        return rows | {"input_states": torch.cat(states)}

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

    def text_readers(self) -> list[TextReader]:
        return [TextReader("text_encoder", self.pipeline.tokenizer, self.config.max_sequence_length)]


class WanImage(Wan):
    """Wan 2.1, image to video: the input image is the first frame."""

    reads_inputs: ClassVar[tuple[str, ...]] = ("image",)
    policy_class: ClassVar[type[DiffusersPolicy]] = WanImagePolicy
    pipeline_class: ClassVar[str] = "WanImageToVideoPipeline"
    pipeline_packages: ClassVar[tuple[str, ...]] = ("ftfy",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "image_processor")
    published: ClassVar[dict[str, Configs]] = {
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": WAN_21_I2V_14B,
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": WAN_21_I2V_14B,
    }

    lora: LoraSettings = LoraSettings(
        rank=32, alpha=64, target_modules=(*WIDE_ADAPTERS.target_modules, "add_k_proj", "add_v_proj")
    )
    """LoRA adapters that are trained. By default rank 32 on the projections of both attentions, the image's too."""
    max_sequence_length: int = Field(default=512, ge=512, le=512)
    """Tokens of a prompt that the network reads. It finds the image's states by this number."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return super().text_parts | {"image_encoder": ("CLIPVisionConfig", "CLIPVisionModel")}

    def taken_channels(self, latent_channels: int) -> int:
        return 2 * latent_channels + self.frames_per_latent

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        return super().latent_shape(network_config | {"in_channels": network_config["out_channels"]})

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        channels, *rest = self.latent_shape(configs["transformer"])
        image = configs["image_encoder"]
        patches = (image.get("image_size", 224) // image.get("patch_size", 32)) ** 2
        return super().conditioning_shapes(configs) | {
            "input_condition": (self.frames_per_latent + channels, *rest),
            "input_states": (patches + 1, image.get("hidden_size", 768)),
        }

"""Wan 2.1 image to video (Wan Team 2025): the transformer reads the first frame's latents and an image encoder's states."""

from typing import ClassVar

import torch
from PIL import Image
from pydantic import Field

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.families.first_frame import FirstFrame, FirstFramePolicy
from ray_ddpo.common.diffusion.families.published_parts import WIDE_ADAPTERS
from ray_ddpo.common.diffusion.families.wan_published import WAN_21_I2V_14B
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.input_images import InputImages, blank_inputs


class WanImagePolicy(FirstFramePolicy):
    """A loaded WanImageToVideoPipeline with an image encoder."""

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

    def text_readers(self) -> list[TextReader]:
        return [TextReader("text_encoder", self.pipeline.tokenizer, self.config.max_sequence_length)]


class WanImage(FirstFrame):
    """Wan 2.1, image to video: the input image is the first frame."""

    policy_class: ClassVar[type[DiffusersPolicy]] = WanImagePolicy
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

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        image = configs["image_encoder"]
        patches = (image.get("image_size", 224) // image.get("patch_size", 32)) ** 2
        return super().conditioning_shapes(configs) | {"input_states": (patches + 1, image.get("hidden_size", 768))}

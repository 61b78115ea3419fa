"""Qwen-Image (Wu et al. 2025, arXiv 2508.02324) and Qwen-Image-Edit: a transformer over a language model's states."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.editing_policy import joined_rows
from ray_ddpo.common.diffusion.families.masked_text import MaskedTextPolicy, masked_rows
from ray_ddpo.common.diffusion.families.normalized_latents import NormalizedLatentsPolicy
from ray_ddpo.common.diffusion.families.packing import PATCH, packed, unpacked
from ray_ddpo.common.diffusion.families.published_parts import BOTH_STREAMS, QWEN_25_VL_7B
from ray_ddpo.common.diffusion.guidance import INPUT, NEGATIVE
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_index import read_object
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader, refuse_marks, tokens_before
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.diffusion.several_inputs import (
    FILLERS,
    LATENTS,
    ReadsSeveralInputs,
    SeveralInputsPolicy,
    input_shapes,
)
from ray_ddpo.common.input_images import InputImages
from ray_ddpo.common.recipe.tables import SamplingTable

OWN_LATENT_SIZE = 128  # not in the configuration: images of 1024² pixels
UNCONDITIONAL = " "  # the text that the authors guide away from where there is no negative prompt

# As in the configuration files of Qwen/Qwen-Image.
QWEN_IMAGE: Configs = {
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    "vae": {"_class_name": "AutoencoderKLQwenImage", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]},
    "text_encoder": QWEN_25_VL_7B,
}

IMAGE_PAD = "<|image_pad|>"  # stands for an image in a text
IMAGE_MARK = f"Picture {{}}: <|vision_start|>{IMAGE_PAD}<|vision_end|>"  # before the prompt, in the later versions
# As in the file of Qwen/Qwen-Image-Edit.
PROCESSOR = {"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "merge_size": 2}
ZERO_CONDITION: Configs = QWEN_IMAGE | {"transformer": QWEN_IMAGE["transformer"] | {"zero_cond_t": True}}


def call_transformer(
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor,
    input_latents: Tensor | None = None,
) -> Tensor:
    """Return the transformer's velocity prediction per row. The mask is above 0 at the tokens of the prompt.

    Tokens of input images stand behind those of the latents, and what the network says of them is ignored.
    """
    height, width = latents.shape[-2:]
    images = [latents] if input_latents is None else [latents, *input_latents.unbind(1)]
    hidden_states = torch.cat([packed(image) for image in images], dim=1)
    tokens = network(
        hidden_states=hidden_states,
        timestep=timesteps.to(latents.dtype) / 1000,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=prompt_embeds_mask > 0,
        img_shapes=[[(1, height // PATCH, width // PATCH)] * len(images)] * len(latents),
        return_dict=False,
    )[0]
    return unpacked(tokens[:, : hidden_states.shape[1] // len(images)], height, width)


def with_norm_of_conditional(
    unconditional: Float[Tensor, "B C H W"], conditional: Float[Tensor, "B C H W"], guidance_scale: float
) -> Float[Tensor, "B C H W"]:
    """Return the guided prediction, each of whose tokens has the norm of the conditional prediction's token."""
    guided = packed(unconditional + guidance_scale * (conditional - unconditional))
    norm = packed(conditional).norm(dim=-1, keepdim=True)
    return unpacked(guided * (norm / guided.norm(dim=-1, keepdim=True)), *conditional.shape[-2:])


class QwenImagePolicy(MaskedTextPolicy, NormalizedLatentsPolicy):
    """A loaded QwenImagePipeline. Latents are stored unpacked and without the axis of frames."""

    config: "QwenImageFamily"
    default_negative: ClassVar[str | None] = UNCONDITIONAL

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        return self._flow_table(sampling, PATCH, evenly_spaced=True)

    def _padded(self, text: str) -> Conditioning:
        length = self.config.max_sequence_length
        embeds, _ = self.pipeline.encode_prompt(text, device=self.device, max_sequence_length=length)
        return masked_rows(embeds, length)

    def text_readers(self) -> list[TextReader]:
        return [TextReader("text_encoder", self.pipeline.tokenizer, self.config.max_sequence_length)]

    def _combined(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
        return with_norm_of_conditional(unconditional, conditional, guidance_scale)


class QwenImageFamily(DiffusersConfig):
    """Keys and sizes that text-to-image and editing models share."""

    takes_sde: ClassVar[bool] = True
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "QwenImageTransformer2DModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    decoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKLQwenImage",)
    latent_key: ClassVar[str] = "z_dim"
    latent_packing: ClassVar[int] = PATCH**2

    lora: LoraSettings = BOTH_STREAMS
    """LoRA adapters that are trained. By default rank 32 on the attention of both streams."""
    max_sequence_length: int = Field(default=512, ge=1, le=1024)
    """Tokens of a prompt that the network reads."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration")}

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        arguments = super().pipeline_arguments(sampling, size)
        # Without a negative prompt the pipeline does not guide, and its guidance_scale is another input.
        guided = {"true_cfg_scale": arguments.pop("guidance_scale"), "negative_prompt": UNCONDITIONAL}
        return guided | arguments

    @property
    def scale_factor(self) -> int:
        return 2 ** len(self.part_config("vae").get("temperal_downsample", (False, True, True)))

    @property
    def size_unit(self) -> int:
        return self.scale_factor * PATCH

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        return network_config["in_channels"] // PATCH**2, *self.latent_sides(OWN_LATENT_SIZE)

    def encoded(self, vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
        return super().encoded(vae, pixels.unsqueeze(2), noise.unsqueeze(2)).squeeze(2)

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2)  # an image is a video of one frame


class QwenImage(QwenImageFamily):
    """Qwen-Image."""

    policy_class: ClassVar[type[DiffusersPolicy]] = QwenImagePolicy
    pipeline_class: ClassVar[str] = "QwenImagePipeline"
    published: ClassVar[dict[str, Configs]] = {"Qwen/Qwen-Image": QWEN_IMAGE}

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        width = configs["transformer"]["joint_attention_dim"]
        return {"prompt_embeds": (self.max_sequence_length, width), "prompt_embeds_mask": (self.max_sequence_length,)}


def call_editing_transformer(
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    input_prompt_embeds: Tensor,
    input_prompt_embeds_mask: Tensor,
    input_latents: Tensor,
    input_fillers: Tensor | None = None,
) -> Tensor:
    """Return the transformer's velocity prediction per row. None of the images is a filler."""
    return call_transformer(network, latents, timesteps, input_prompt_embeds, input_prompt_embeds_mask, input_latents)


class QwenImageEditPolicy(SeveralInputsPolicy, QwenImagePolicy):
    """A loaded QwenImageEditPipeline. The states of a prompt depend on its input images, and so do those of the negative."""

    config: "QwenImageEditFamily"

    def _encode_texts(self, prompts: list[str], inputs: InputImages) -> Conditioning:
        """Return the states of each prompt, and with guidance those of the negative prompt, beside the input images."""
        negative = UNCONDITIONAL if self.negative_prompt is None else self.negative_prompt
        branches = {INPUT: prompts, NEGATIVE + INPUT: [negative] * len(prompts)}
        found: Conditioning = {}
        for prefix in list(branches)[: self.branches]:
            keys = [(prefix, *row) for row in zip(branches[prefix], inputs.contents, strict=True)]
            images = dict(zip(keys, inputs.images, strict=True))
            known = self._cached(list(images), lambda key, images=images: self._states(key[1], images[key], key[0]))
            found |= joined_rows([known[key] for key in keys])
        return found

    def _states(self, text: str, images: UInt8[np.ndarray, "N H W 3"], prefix: str) -> Conditioning:
        """Return the language model's states of a text with images. Their names begin with `prefix`."""
        refuse_marks((IMAGE_PAD,), [text])  # again, because a start checks only a file's first prompts
        size = self.config.shown_size(self.image_size())
        shown = [self.pipeline.image_processor.resize(Image.fromarray(image), *size) for image in images]
        embeds, _ = self.pipeline.encode_prompt(text, image=shown if len(shown) > 1 else shown[0], device=self.device)
        length, longest = (self.config.row_length(self.image_size(), n) for n in (len(shown), self.most_inputs))
        return {prefix + name: row for name, row in masked_rows(embeds[:, :length], longest).items()}

    def text_readers(self) -> list[TextReader]:
        pipeline = self.pipeline
        most = self.most_inputs
        # The mark of an image is one of these tokens, and the image's own have places beside.
        marks = "".join(self.config.image_mark.format(number) for number in range(1, most + 1))
        template = pipeline.prompt_template_encode.format(f"{marks}{{}}").format
        before = tokens_before(pipeline.tokenizer, template) - pipeline.prompt_template_encode_start_idx
        length = self.config.max_sequence_length - before + most
        return [TextReader("text_encoder", pipeline.tokenizer, length, marks=(IMAGE_PAD,))]


class QwenImageEditFamily(QwenImageFamily):
    """What all versions share. Input and output have one size."""

    reads_inputs: ClassVar[tuple[str, ...]] = ("image",)
    policy_class: ClassVar[type[DiffusersPolicy]] = QwenImageEditPolicy
    pipeline_packages: ClassVar[tuple[str, ...]] = ("torchvision",)  # for its processor
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "processor")
    image_mark: ClassVar[str]  # text that stands for a numbered image before the prompt, unless the template has it

    def shown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the image that the language model sees, for an input image of this size."""
        return size

    def row_length(self, size: tuple[int, int], images: int) -> int:
        """Return how many states of the language model the network reads, for so many input images of this size."""
        from ray_ddpo.common.diffusion.loading.image_text_reader import image_tokens

        file = self.folder() / "processor" / "preprocessor_config.json"
        keys = read_object(file) if file.is_file() else PROCESSOR
        return images * image_tokens(keys, self.shown_size(size)) + self.max_sequence_length

    def made_parts(self, folder: Path) -> dict[str, Any]:
        from ray_ddpo.common.diffusion.loading.image_text_reader import image_text_reader

        return {"processor": image_text_reader(folder / "processor")}

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_editing_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        channels, *sides = self.latent_shape(configs["transformer"])
        length = self.row_length((self.scale_factor * sides[0], self.scale_factor * sides[1]), self.most_inputs)
        width = configs["transformer"]["joint_attention_dim"]
        texts = {f"{INPUT}prompt_embeds": (length, width), f"{INPUT}prompt_embeds_mask": (length,)}
        return texts | input_shapes((channels, *sides), self.most_inputs)

    def with_negative(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return shapes | {NEGATIVE + name: shape for name, shape in shapes.items() if name not in (LATENTS, FILLERS)}


class QwenImageEdit(QwenImageEditFamily):
    """Qwen-Image-Edit."""

    pipeline_class: ClassVar[str] = "QwenImageEditPipeline"
    image_mark: ClassVar[str] = ""
    published: ClassVar[dict[str, Configs]] = {"Qwen/Qwen-Image-Edit": QWEN_IMAGE}


class QwenImageEditPlus(ReadsSeveralInputs, QwenImageEditFamily):
    """Qwen-Image-Edit-2509 and -2511, whose language model sees a small copy of each input image."""

    pipeline_class: ClassVar[str] = "QwenImageEditPlusPipeline"
    image_mark: ClassVar[str] = IMAGE_MARK
    published: ClassVar[dict[str, Configs]] = {
        "Qwen/Qwen-Image-Edit-2509": QWEN_IMAGE,
        "Qwen/Qwen-Image-Edit-2511": ZERO_CONDITION,
    }

    def shown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
            CONDITION_IMAGE_SIZE,
            calculate_dimensions,
        )

        width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, size[1] / size[0])
        return height, width

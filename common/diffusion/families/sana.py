"""SANA (Xie et al. 2024, arXiv 2410.10629): linear attention over strongly compressed latents, with flow matching."""

import inspect
import math
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import MASKED_EMBEDDINGS, DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.published_parts import GEMMA_2_2B, WIDE_ADAPTERS
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.recipe.tables import SamplingTable

PIPELINES_UNIT = 32  # pixels: the pipeline takes multiples of it, whatever the decoder

# As in the configuration files of Efficient-Large-Model/Sana_1600M_1024px_diffusers and Sana_600M_1024px_diffusers.
BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SANA_1600M: Configs = {
    "transformer": {
        "_class_name": "SanaTransformer2DModel",
        "sample_size": 32,
        "num_layers": 20,
        "num_attention_heads": 70,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
    },
    "vae": {
        "_class_name": "AutoencoderDC",
        "encoder_block_types": BLOCKS,
        "decoder_block_types": BLOCKS,
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
    "text_encoder": GEMMA_2_2B,
}
SANA_600M: Configs = SANA_1600M | {
    "transformer": SANA_1600M["transformer"]
    | {
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    }
}


def call_transformer(
    network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, prompt_attention_mask: Tensor
) -> Tensor:
    """Return the transformer's velocity prediction per row. Channels of a predicted variance are left out."""
    output = network(
        hidden_states=latents,
        encoder_hidden_states=prompt_embeds,
        encoder_attention_mask=prompt_attention_mask,
        timestep=timesteps * network.config.timestep_scale,
        return_dict=False,
    )[0]
    return output[:, : latents.shape[1]]


class SanaPolicy(DiffusersPolicy):
    """A loaded SanaPipeline."""

    config: "Sana"
    embeddings: ClassVar[tuple[str, ...]] = MASKED_EMBEDDINGS
    default_negative: ClassVar[str | None] = ""
    adds_shift: ClassVar[bool] = False

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        return self._solver_table(sampling)

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        # The instruction that the pipeline writes before a prompt is the default of its call, not of its encode_prompt.
        instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        keys |= {"complex_human_instruction": instruction, "max_sequence_length": self.config.max_sequence_length}
        return super()._encode(prompt, with_negative, **keys)

    def text_readers(self) -> list[TextReader]:
        # The network reads the instruction's first and last token before those of the prompt, whose first is one of them.
        return [TextReader("text_encoder", self.pipeline.tokenizer, self.config.max_sequence_length - 1, template=1)]


class Sana(DiffusersConfig):
    """SANA and SANA-1.5."""

    takes_sde: ClassVar[bool] = True
    policy_class: ClassVar[type[DiffusersPolicy]] = SanaPolicy
    pipeline_class: ClassVar[str] = "SanaPipeline"
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "SanaTransformer2DModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    decoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderDC",)
    published: ClassVar[dict[str, Configs]] = {
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": SANA_1600M,
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": SANA_1600M,
        "Efficient-Large-Model/Sana_600M_1024px_diffusers": SANA_600M,
    }

    lora: LoraSettings = WIDE_ADAPTERS
    """LoRA adapters that are trained. By default rank 32 on the projections of both attentions."""
    max_sequence_length: int = Field(default=300, ge=3, le=1024)
    """Tokens that the network reads: two of the instruction that precedes each prompt, the others of the prompt."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("Gemma2Config", "Gemma2Model")}

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        # By default 1024 × 1024 pixels, whatever the model.
        own = {"height": size[0], "width": size[1], "use_resolution_binning": False}
        return super().pipeline_arguments(sampling, size) | own

    @property
    def size_unit(self) -> int:
        return math.lcm(PIPELINES_UNIT, self.scale_factor * self.part_config("transformer").get("patch_size", 1))

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        tokens = self.max_sequence_length
        return {
            "prompt_embeds": (tokens, configs["text_encoder"]["hidden_size"]),
            "prompt_attention_mask": (tokens,),
        }

"""The architectures of FLUX.2-dev and FLUX.2-klein, so that planning needs no hub."""

from typing import Any

from ray_ddpo.common.diffusion.families.published_parts import AUTOENCODER, QWEN_3_4B

_DECODER: dict[str, Any] = AUTOENCODER | {"_class_name": "AutoencoderKLFlux2", "latent_channels": 32}
_QWEN_3_8B: dict[str, Any] = QWEN_3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}


def _transformer(double: int, single: int, heads: int, text_width: int, guidance: bool) -> dict[str, Any]:
    """Return the configuration of a network with so many blocks of two streams and of one."""
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": 128,
        "num_attention_heads": heads,
        "joint_attention_dim": text_width,
        "guidance_embeds": guidance,
    }


# As in the configuration files of black-forest-labs/FLUX.2-dev. The text encoder is Mistral Small 3.2.
DEV: dict[str, dict[str, Any]] = {
    "transformer": _transformer(8, 48, 48, 15360, guidance=True),
    "vae": _DECODER,
    "text_encoder": {
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 1540,
            "patch_size": 14,
        },
    },
}
# As in those of FLUX.2-klein-4B and -9B. The base models differ in `is_distilled` only.
KLEIN_BASE_4B: dict[str, dict[str, Any]] = {
    "model_index": {"is_distilled": False},
    "transformer": _transformer(5, 20, 24, 7680, guidance=False),
    "vae": _DECODER,
    "text_encoder": QWEN_3_4B | {"tie_word_embeddings": True},
}
KLEIN_BASE_9B = KLEIN_BASE_4B | {
    "transformer": _transformer(8, 24, 32, 12288, guidance=False),
    "text_encoder": _QWEN_3_8B,
}
KLEIN_4B, KLEIN_9B = (base | {"model_index": {"is_distilled": True}} for base in (KLEIN_BASE_4B, KLEIN_BASE_9B))

"""Small pipelines of the families whose prompts one masked text encoder reads, of diffusers' own classes."""

import inspect
from pathlib import Path
from typing import Any

import torch

from tests.tiny_decoders import EIGHTFOLD

LUMINA_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start>"
)
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def save_tiny_sana(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes the published configuration, of a solver on a flow's noise levels."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
    )
    blocks: Any = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    stages: Any = {"encoder_block_types": blocks, "decoder_block_types": blocks}
    stages |= {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    stages |= {"encoder_layers_per_block": (1,) * 4, "decoder_layers_per_block": (1,) * 4}
    stages |= {"encoder_qkv_multiscales": ((), (), (), (5,)), "decoder_qkv_multiscales": ((), (), (), (5,))}
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
        **stages,
    )
    keys: Any = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **scheduler}
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer = tiny_gemma_tokenizer("\n".join(instruction))
    SanaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**keys),
        vae=vae,
        text_encoder=_gemma_2(32, len(tokenizer)),
        tokenizer=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_pixart_sigma(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes the published configuration, of a solver on a schedule of betas."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    keys: Any = {"beta_schedule": "linear", "timestep_spacing": "linspace", **scheduler}
    PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**keys),
        vae=AutoencoderKL(**EIGHTFOLD, scaling_factor=0.13),
        text_encoder=tiny_t5(32),
        tokenizer=tiny_t5_tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_lumina2(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes its configuration. The system prompt is 2 tokens before a prompt."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(40, 16, 16),
        cap_feat_dim=32,
    )
    keys: Any = {"shift": 6.0, **scheduler}
    autoencoder: Any = EIGHTFOLD | {"scaling_factor": 0.4, "shift_factor": 0.1, "use_quant_conv": False}
    tokenizer = tiny_gemma_tokenizer(LUMINA_PROMPT)
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=AutoencoderKL(**autoencoder, use_post_quant_conv=False),
        text_encoder=_gemma_2(32, len(tokenizer), layers=2),
        tokenizer=tokenizer,
    )
    assert f"{pipeline.system_prompt} <Prompt Start>" == LUMINA_PROMPT
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_t5_tokenizer(max_length: int = 12) -> Any:
    """Return a tokenizer whose tokens are letters."""
    from transformers import T5TokenizerFast

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=max_length)


def tiny_gemma_tokenizer(instruction: str) -> Any:
    """Return a tokenizer of letters that reads the instruction before a prompt as one token."""
    from transformers import GemmaTokenizer

    named = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    vocabulary = {token: index for index, token in enumerate([*named, *LETTERS])}
    tokenizer: Any = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    tokenizer.add_special_tokens({"extra_special_tokens": [instruction]})
    return tokenizer


def _gemma_2(width: int, vocabulary: int, layers: int = 1) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    keys: Any = {
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
    return Gemma2Model(Gemma2Config(**keys, num_attention_heads=2, num_key_value_heads=1, head_dim=8))


def tiny_t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=64,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )

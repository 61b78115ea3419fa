"""Build the parts of the model that writes, and save them as a Stable Diffusion 3 pipeline in diffusers' own format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ray_ddpo.learner.pretraining.modules import END, START, build_tokenizer, written_pipeline

LATENT_CHANNELS = 8
WIDTH, HEADS, LAYERS = 192, 3, 4
READER_WIDTH, SPELLER_WIDTH = 96, 64  # of the two text encoders
SHIFT = 2.0  # of the timesteps towards noise, where letters and places are decided
# Words with a token of their own. All others, and so the words of signs, are read letter by letter.
KNOWN = """
a that says reads shows sign label card two three and of left right above below red yellow green blue black
circle square triangle circles squares triangles
"""
WORDS = KNOWN.split()
NO_LOG_VARIANCE = -20.0


def build_flow_autoencoder() -> AutoencoderKL:
    """Build the autoencoder: 64 x 64 pixels in -1 ... 1 to latents [8, 16, 16] and back, 0.2 M parameters."""
    autoencoder_class: Any = AutoencoderKL  # diffusers' annotations say tuples of one
    autoencoder: AutoencoderKL = autoencoder_class(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        # Training uses the means only, so the encoder is made to have next to no variance.
        last: Any = autoencoder.encoder.conv_out
        last.weight[LATENT_CHANNELS:] = 0
        last.bias[LATENT_CHANNELS:] = NO_LOG_VARIANCE
    return autoencoder


def build_transformer() -> SD3Transformer2DModel:
    """Build the transformer: velocity of latents [8, 16, 16] in 64 tokens, 5.1 M parameters."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=READER_WIDTH + SPELLER_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=READER_WIDTH + SPELLER_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def build_text_encoders(tokenizer: CLIPTokenizer) -> dict[str, CLIPTextModelWithProjection]:
    """Build the two text encoders. SD3 takes the last layer but one: the second encoder's is the embedded characters."""
    return {
        "text_encoder": _text_encoder(tokenizer, READER_WIDTH, layers=3),
        "text_encoder_2": _text_encoder(tokenizer, SPELLER_WIDTH, layers=1),
    }


def _text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    """Build a text encoder of some width and number of layers."""
    vocabulary = tokenizer.get_vocab()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    return CLIPTextModelWithProjection(config)


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler of rectified flow."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def build_letter_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer: a token for each of `WORDS` in lower case, and for each letter of any other word."""
    tokenizer = build_tokenizer([])
    known: list[Any] = [AddedToken(word, single_word=True, normalized=False) for word in WORDS]
    tokenizer.add_tokens(known)
    return tokenizer


def save_flow_pipeline(modules: Mapping[str, torch.nn.Module], output: Path) -> None:
    """Save a float16 pipeline of `transformer`, both text encoders and `vae`; each file is replaced atomically."""
    others = {name: build_letter_tokenizer() for name in ("tokenizer", "tokenizer_2")}
    others |= {"scheduler": build_flow_scheduler(), "text_encoder_3": None, "tokenizer_3": None}
    with written_pipeline(StableDiffusion3Pipeline, modules, others, output):
        pass

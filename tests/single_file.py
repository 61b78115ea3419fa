"""Write a tiny Stable Diffusion as one file, under the names of Stability's code and of Civitai's files."""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.tiny_decoders import AUTOENCODER
from tests.tiny_pipeline import save_tiny_pipeline

IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
IN_DECODER = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def unet_name(name: str, layers: int, with_attention: set[int]) -> str:
    """Return the name of a UNet's weight in Stability's code. `with_attention` lists up blocks with attention."""
    for ours, theirs in OUTSIDE.items():
        if name.startswith(f"{ours}."):
            name = theirs + name.removeprefix(ours)
    side, block, kind, layer, rest = re.fullmatch(
        r"(?:(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.)?(.*)", name
    ).groups()  # type: ignore[union-attr]
    if side:
        place = (layers + 1) * int(block) + int(layer) + (side == "down")
        if kind == "downsamplers":
            name = f"input_blocks.{(layers + 1) * (int(block) + 1)}.0.{rest.replace('conv.', 'op.')}"
        elif kind == "upsamplers":
            name = f"output_blocks.{(layers + 1) * int(block) + layers}.{1 + (int(block) in with_attention)}.{rest}"
        else:
            where = "input_blocks" if side == "down" else "output_blocks"
            name = f"{where}.{place}.{int(kind == 'attentions')}.{rest}"
    if kind == "resnets" or name.startswith(("middle_block.0", "middle_block.2")):
        for ours, theirs in IN_RESNET.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return f"model.diffusion_model.{name}"


def decoder_name(name: str, blocks: int) -> str:
    """Return the name of a weight of diffusers' AutoencoderKL in Stability's code."""
    for ours, theirs in IN_DECODER.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    name = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{blocks - 1 - int(found[1])}.block", name)
    return "first_stage_model." + re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample", name
    )


def as_one_file(pipeline: Any) -> dict[str, Any]:
    """Return the weights of a Stable Diffusion under the names of one file."""
    config = pipeline.unet.config
    attention = {place for place, kind in enumerate(config.up_block_types) if "CrossAttn" in kind}
    state = {unet_name(name, config.layers_per_block, attention): v for name, v in pipeline.unet.state_dict().items()}
    blocks = len(pipeline.vae.config.block_out_channels)
    state |= {decoder_name(name, blocks): value for name, value in pipeline.vae.state_dict().items()}
    text = {name.removeprefix("text_model."): value for name, value in pipeline.text_encoder.state_dict().items()}
    state |= {f"cond_stage_model.transformer.text_model.{name}": value for name, value in text.items()}
    return {name: value.contiguous() for name, value in state.items()}


def save_single_file(folder: Path) -> tuple[Path, Path, Any]:
    """Write a model as one file and as a folder; return both, and diffusers' pipeline of the folder."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    save_tiny_pipeline(folder / "tiny")
    vae = AutoencoderKL(**AUTOENCODER)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "tiny", vae=vae, safety_checker=None)
    pipeline.save_pretrained(folder / "model")
    save_file(as_one_file(pipeline), folder / "model.safetensors")
    return folder / "model.safetensors", folder / "model", pipeline

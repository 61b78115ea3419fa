"""Build the embedded model's five parts, and save them as a pipeline in diffusers' own format."""

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 96
MAX_TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def build_autoencoder() -> AutoencoderTiny:
    """Build the autoencoder: 64 x 64 pixels in -1 ... 1 to latents [4, 16, 16] and back, 0.3 M parameters."""
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=4,
    )
    to_channels_last(autoencoder)
    return autoencoder


def build_unet() -> UNet2DConditionModel:
    """Build the UNet: noise prediction on latents [4, 16, 16], 4.8 M parameters."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 80, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    to_channels_last(unet)
    return unet


def to_channels_last(network: torch.nn.Module) -> None:
    """Convert convolution weights to the memory format channels_last, which is fastest on a CPU."""
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder: two layers of width 96."""
    vocabulary = tokenizer.get_vocab()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    return CLIPTextModel(config)


def build_scheduler() -> DDIMScheduler:
    """Build the scheduler, with Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Build the tokenizer: byte-pair encoding with a token for each word, and bytes for all other text."""
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(words, Path(folder))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def write_vocabulary(words: list[str], folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` for CLIPTokenizer."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _merged([*word[:-1], word[-1] + "</w>"], merges)
        # Merges are only ever appended, so a word that is one token once stays one token.
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    characters = _characters_of_bytes()
    tokens = characters + [c + "</w>" for c in characters] + ["".join(merge) for merge in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def _merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for left, right in merges:
        index = 0
        while index < len(pieces) - 1:
            if (pieces[index], pieces[index + 1]) == (left, right):
                pieces = [*pieces[:index], left + right, *pieces[index + 2 :]]
            index += 1
    return pieces


def _characters_of_bytes() -> list[str]:
    # GPT-2's printable stand-ins for the 256 bytes, which CLIP's tokenizer shares.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def save_pipeline(modules: Mapping[str, torch.nn.Module], words: list[str], output: Path) -> None:
    """Save a float16 pipeline of `unet`, `text_encoder` and `vae` in `output`; each file is replaced atomically."""
    others = {"tokenizer": build_tokenizer(words), "scheduler": build_scheduler()}
    others |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with written_pipeline(StableDiffusionPipeline, modules, others, output) as writing:
        write_vocabulary(words, writing / "tokenizer")
        _tidy_autoencoder_config(writing / "vae" / "config.json")


@contextmanager
def written_pipeline(
    pipeline_class: Any, modules: Mapping[str, torch.nn.Module], others: Mapping[str, Any], output: Path
) -> Iterator[Path]:
    """Yield a folder with a pipeline, networks in float16, to be altered. Then replace each file of `output` by it.

    No configuration names the folder that a part was loaded from in training.
    """
    pipeline = pipeline_class(**{name: copy.deepcopy(module).half() for name, module in modules.items()}, **others)
    pipeline.set_progress_bar_config(disable=True)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        writing = Path(folder)
        pipeline.save_pretrained(writing)
        # transformers loads what the configuration says; half precision is only for the disk.
        for text_config in writing.glob("text_encoder*/config.json"):
            text_config.write_text(text_config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        for config in writing.rglob("config.json"):
            keys = json.loads(config.read_text())
            if keys.pop("_name_or_path", None) is not None:
                config.write_text(json.dumps(keys, indent=2) + "\n")
        yield writing
        for file in sorted(path for path in writing.rglob("*") if path.is_file()):
            target = output / file.relative_to(writing)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def _tidy_autoencoder_config(config_file: Path) -> None:
    # AutoencoderTiny writes this key for other readers and then warns of it at every load.
    config = json.loads(config_file.read_text())
    del config["block_out_channels"]
    config_file.write_text(json.dumps(config, indent=2) + "\n")

"""CLIP's two towers: pictures and prompts as embeddings, from a folder or the hub; weights that lack are an error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from common.clip_preprocessing import clip_pixels
from common.model_hub import Weights, cannot_load, read_from_folder_or_hub
from common.trajectory import DTYPES

Precision = Literal["auto", "float32", "float16", "bfloat16"]  # auto: half on CUDA, float32 elsewhere
EmbedImages = Callable[[UInt8[Tensor, "B H W 3"]], Float[Tensor, "B D"]]
EmbedTexts = Callable[[list[str]], Float[Tensor, "B D"]]

CLIP_FILES = ("config.json", "*.safetensors")
TOKENIZER_FILE = "tokenizer.json"
HIGHEST_TOKEN = 2  # what old configurations say of the end-of-text token, and transformers then takes the highest one


def torch_dtype(precision: Precision, device: str) -> torch.dtype:
    """What weights and activations are in on `device`."""
    automatic = "float16" if device.startswith("cuda") else "float32"
    return DTYPES[automatic if precision == "auto" else precision]


def weight_bytes(parameters: int, precision: Precision) -> int:
    """What so many weights take; on "auto" what a GPU would take."""
    return parameters * torch_dtype(precision, "cuda").itemsize


@dataclass(frozen=True)
class ClipTowers:
    """Both towers on one device. Embeddings are projected, of L2 norm 1 and in float32."""

    embed_images: EmbedImages
    embed_texts: EmbedTexts  # longer prompts are cut as CLIPProcessor(truncation=True) cuts them, at CLIP's 77 tokens
    logit_scale: float  # the learned factor of the cosine in CLIP's softmax, near 100
    device: str

    def cosines(self, images: UInt8[np.ndarray, "B H W 3"], prompts: list[str]) -> Float[np.ndarray, "B"]:
        """Between each picture and its own prompt, -1 … 1. A prompt that occurs several times is encoded once."""
        place = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.embed_texts(list(place))[[place[prompt] for prompt in prompts]]
        # A copy: pictures out of Ray's store are read-only, and torch warns of sharing them.
        pictures = self.embed_images(torch.from_numpy(np.array(images)).to(self.device))
        return (pictures * texts).sum(1).cpu().numpy()


def load_image_embedder(clip: str, device: str, dtype: torch.dtype, missing: str) -> tuple[EmbedImages, int]:
    """The image tower alone, and the dimension of its embeddings. ValueError: `missing`, and why."""
    from transformers import CLIPVisionModelWithProjection

    tower = _read_model(CLIPVisionModelWithProjection, clip, dtype, missing).to(device)
    side = tower.config.image_size

    @torch.no_grad()
    def embed(images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B D"]:
        return unit(tower(pixel_values=clip_pixels(images, side).to(dtype)).image_embeds)

    return embed, tower.config.projection_dim


def load_clip(clip: Weights, tokenizer: Weights, device: str, dtype: torch.dtype) -> ClipTowers:
    """A whole CLIP of transformers'. ValueError: the key of the recipe whose files cannot be read, and why."""
    from transformers import CLIPModel

    model = _read_model(CLIPModel, clip.source, dtype, cannot_load(clip))
    return clip_towers(model, tokenizer, device)


def clip_towers(model: Any, tokenizer: Weights, device: str, whole: bool = False) -> ClipTowers:
    """The towers of a CLIPModel. `whole`: pictures that are not square keep their edges (clip_preprocessing)."""
    model = model.to(device).eval().requires_grad_(False)
    tokens = load_tokenizer(tokenizer, model.config.text_config)
    side, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def embed_images(images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B D"]:
        pixels = clip_pixels(images, side, whole).to(model.dtype)
        return unit(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))

    @torch.no_grad()
    def embed_texts(prompts: list[str]) -> Float[Tensor, "B D"]:
        encoded = tokens(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        return unit(model.text_projection(model.text_model(**encoded).pooler_output))

    return ClipTowers(embed_images, embed_texts, model.logit_scale.float().exp().item(), device)


def unit(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """In float32, of L2 norm 1."""
    embeddings = embeddings.float()
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


def load_tokenizer(tokenizer: Weights, text_config: Any) -> Any:
    """CLIP's tokenizer. ValueError: it is not there, or it is not the one that the text tower learned with."""
    from huggingface_hub import hf_hub_download
    from transformers import CLIPTokenizer

    def read(source: str | Path, local_files_only: bool) -> Any:
        # Looked for first: of a source without a vocabulary transformers makes a tokenizer that knows no word.
        if isinstance(source, Path):
            (source / TOKENIZER_FILE).open().close()
        else:
            hf_hub_download(source, TOKENIZER_FILE, local_files_only=local_files_only)
        return CLIPTokenizer.from_pretrained(source, local_files_only=local_files_only)

    tokens = read_from_folder_or_hub(read, tokenizer.source, cannot_load(tokenizer))
    ends_alike = text_config.eos_token_id in (HIGHEST_TOKEN, tokens.eos_token_id)
    if len(tokens) != text_config.vocab_size or not ends_alike:
        raise ValueError(
            f"{tokenizer.key} is {tokenizer.source!r}, whose tokenizer has {len(tokens)} tokens and ends a text with number "
            f"{tokens.eos_token_id}: CLIP's text tower here takes {text_config.vocab_size} and {text_config.eos_token_id}"
        )
    return tokens


def _read_model(cls: Any, clip: str, dtype: torch.dtype, missing: str) -> Any:
    def read(source: str | Path, local_files_only: bool) -> Any:
        return loaded(cls, source, missing, dtype=dtype, local_files_only=local_files_only)

    return read_from_folder_or_hub(read, clip, missing).eval().requires_grad_(False)


def loaded(cls: Any, source: str | Path | None, missing: str, **options: Any) -> Any:
    """`cls.from_pretrained`, and a ValueError where transformers would fill weights with random numbers."""
    with _errors_only():  # a whole CLIP has a text tower, and each of its weights would be reported as not needed
        model, found = cls.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    absent, misfits = sorted(found["missing_keys"]), sorted(name for name, *_ in found["mismatched_keys"])
    if absent or misfits:
        fault = "weights are missing" if absent else "weights are of another size than the configuration says"
        raise ValueError(f"{missing} ({fault}: {(absent or misfits)[0]}, {len(absent or misfits)} in all)")
    return model


@contextmanager
def _errors_only() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

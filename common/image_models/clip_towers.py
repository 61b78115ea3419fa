"""CLIP's two towers: images and prompts as embeddings of L2 norm 1, whose cosine says how well they match."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ray_ddpo.common.image_models.clip_preprocessing import clip_pixels
from ray_ddpo.common.image_models.differentiable_preprocessing import clip_pixels_with_gradient
from ray_ddpo.common.model_files.model_hub import Weights, cannot_load
from ray_ddpo.common.model_files.pretrained import read_model, read_tokenizer

EmbedImages = Callable[[UInt8[Tensor, "B H W 3"]], Float[Tensor, "B D"]]
EmbedPixels = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B D"]]
EmbedTexts = Callable[[list[str]], Float[Tensor, "B D"]]

HIGHEST_TOKEN = 2  # eos_token_id in old configurations, for which transformers uses the highest token


@dataclass(frozen=True)
class ClipTowers:
    """Both towers on one device. Embeddings are projected, of L2 norm 1 and in float32."""

    embed_images: EmbedImages
    embed_texts: EmbedTexts  # truncates at CLIP's 77 tokens, as CLIPProcessor(truncation=True) does
    logit_scale: float  # the learned factor of the cosine in CLIP's softmax, near 100
    device: str
    embed_with_gradient: EmbedPixels  # images from 0 to 1, as `embed_images` sees them after rounding to uint8

    def cosines(self, images: UInt8[np.ndarray, "B H W 3"], prompts: list[str]) -> Float[np.ndarray, "B"]:
        """Return the cosine between each image and its prompt, -1 … 1. Each distinct prompt is encoded once."""
        index = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.embed_texts(list(index))[[index[prompt] for prompt in prompts]]
        # Copy, because images from Ray's store are read-only, and torch warns about sharing these.
        embeddings = self.embed_images(torch.from_numpy(np.array(images)).to(self.device))
        return (embeddings * texts).sum(1).cpu().numpy()

    def cosines_with_gradient(self, pixels: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, "B"]:
        """Return `cosines` of images from 0 to 1, with the gradient with respect to them."""
        index = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.embed_texts(list(index))[[index[prompt] for prompt in prompts]]
        return (self.embed_with_gradient(pixels) * texts).sum(1)


@dataclass(frozen=True)
class ImageEmbedder:
    """The image tower alone."""

    embed: EmbedImages
    embed_with_gradient: EmbedPixels
    dimension: int  # of its embeddings


def load_image_embedder(clip: str, device: str, dtype: torch.dtype, missing: str) -> ImageEmbedder:
    """Load the image tower only.

    If that is not possible, raise ValueError, which begins with `missing`.
    """
    from transformers import CLIPVisionModelWithProjection

    tower = read_model(CLIPVisionModelWithProjection, clip, dtype, missing).to(device).requires_grad_(False)
    side = tower.config.image_size

    @torch.no_grad()
    def embed(images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B D"]:
        return unit(tower(pixel_values=clip_pixels(images, side).to(dtype)).image_embeds)

    def embed_with_gradient(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return unit(tower(pixel_values=clip_pixels_with_gradient(pixels, side).to(dtype)).image_embeds)

    return ImageEmbedder(embed, embed_with_gradient, tower.config.projection_dim)


def load_clip(clip: Weights, tokenizer: Weights, device: str, dtype: torch.dtype) -> ClipTowers:
    """Load a transformers CLIP. Raise ValueError with the recipe's key and the reason if its files cannot be read."""
    from transformers import CLIPModel

    return clip_towers(read_model(CLIPModel, clip.source, dtype, cannot_load(clip)), tokenizer, device)


def clip_towers(model: Any, tokenizer: Weights, device: str, whole: bool = False) -> ClipTowers:
    """Return the towers of a CLIPModel. If `whole`, images are padded to a square instead of cropped."""
    model = model.to(device).requires_grad_(False)
    tokens = _tokenizer_for(model.config.text_config, tokenizer)
    side, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def embed_images(images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B D"]:
        pixels = clip_pixels(images, side, whole).to(model.dtype)
        return unit(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))

    def embed_with_gradient(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        inputs = clip_pixels_with_gradient(pixels, side, whole).to(model.dtype)
        return unit(model.visual_projection(model.vision_model(pixel_values=inputs).pooler_output))

    @torch.no_grad()
    def embed_texts(prompts: list[str]) -> Float[Tensor, "B D"]:
        encoded = tokens(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        return unit(model.text_projection(model.text_model(**encoded).pooler_output))

    scale = model.logit_scale.float().exp().item()
    return ClipTowers(embed_images, embed_texts, scale, device, embed_with_gradient)


def unit(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Normalize embeddings to L2 norm 1, in float32."""
    embeddings = embeddings.float()
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


def _tokenizer_for(text_config: Any, tokenizer: Weights) -> Any:
    """Read the tokenizer and check that it fits the text tower."""
    from transformers import CLIPTokenizer

    tokens = read_tokenizer(CLIPTokenizer, tokenizer)
    # With another vocabulary or end-of-text token, every prompt would silently get a wrong embedding.
    ends_alike = text_config.eos_token_id in (HIGHEST_TOKEN, tokens.eos_token_id)
    if len(tokens) != text_config.vocab_size or not ends_alike:
        raise ValueError(
            f"{tokenizer.key} is {tokenizer.source!r}, whose tokenizer has {len(tokens)} tokens and ends a text with "
            f"number {tokens.eos_token_id}: CLIP's text tower here takes {text_config.vocab_size} and "
            f"{text_config.eos_token_id}"
        )
    return tokens

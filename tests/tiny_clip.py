"""A small CLIP with random weights and a small vocabulary, and a head for it, in the formats that the rewards read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

EMBEDDING = 16
SIDE = 32
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("a", "n</w>")]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": EMBEDDING,
}


def vocabulary() -> dict[str, int]:
    """Return a small version of CLIP's vocabulary: bytes, bytes at word ends, merges, and both ends of a text."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in MERGES)]
    return {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def save_tiny_tokenizer(folder: Path) -> Path:
    """Write a tokenizer that splits as CLIP's does and knows few words."""
    from transformers import CLIPTokenizer

    CLIPTokenizer(vocab=vocabulary(), merges=MERGES, model_max_length=77).save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Write a complete CLIP as on the hub: image tower, text tower and tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    words = len(vocabulary())
    vision = {**SMALL, "image_size": SIDE, "patch_size": 8}
    text = {**SMALL, "vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING))
    # Weights of the usual 0.02 would give nearly one embedding for all images, and one for all prompts.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return save_tiny_tokenizer(folder)


@dataclass(frozen=True)
class ViT:
    """The sizes of an open_clip ViT with its text tower; by default the small one of the tests."""

    image_width: int = 32
    image_blocks: int = 2
    patch: int = 8
    side: int = SIDE
    text_width: int = 32
    text_blocks: int = 2
    words: int = len(MERGES) + 2 * 256 + 2
    embedding: int = EMBEDDING


def open_clip_shapes(vit: ViT = ViT()) -> dict[str, tuple[int, ...]]:  # noqa: B008 (it is frozen)
    """Return every weight of open_clip's model of these sizes by its name."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (77, vit.text_width),
        "text_projection": (vit.text_width, vit.embedding),
        "token_embedding.weight": (vit.words, vit.text_width),
        "visual.class_embedding": (vit.image_width,),
        "visual.positional_embedding": ((vit.side // vit.patch) ** 2 + 1, vit.image_width),
        "visual.proj": (vit.image_width, vit.embedding),
        "visual.conv1.weight": (vit.image_width, 3, vit.patch, vit.patch),
        **_norm("visual.ln_pre", vit.image_width),
        **_norm("visual.ln_post", vit.image_width),
        **_norm("ln_final", vit.text_width),
    }
    towers = (("visual.", vit.image_width, vit.image_blocks), ("", vit.text_width, vit.text_blocks))
    for tower, width, blocks in towers:
        for number in range(blocks):
            shapes |= _block(f"{tower}transformer.resblocks.{number}", width)
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _block(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        **_norm(f"{name}.ln_1", width),
        **_norm(f"{name}.ln_2", width),
        f"{name}.attn.in_proj_weight": (3 * width, width),
        f"{name}.attn.in_proj_bias": (3 * width,),
        f"{name}.attn.out_proj.weight": (width, width),
        f"{name}.attn.out_proj.bias": (width,),
        f"{name}.mlp.c_fc.weight": (4 * width, width),
        f"{name}.mlp.c_fc.bias": (4 * width,),
        f"{name}.mlp.c_proj.weight": (width, 4 * width),
        f"{name}.mlp.c_proj.bias": (width,),
    }


def tiny_open_clip_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of the small model."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in open_clip_shapes().items()}
    return state | {"logit_scale": torch.tensor(4.6)}


def save_tiny_open_clip(path: Path, seed: int = 0) -> Path:
    """Write a checkpoint in HPS v2's format: a state dict inside a dict, of weights only."""
    torch.save({"state_dict": tiny_open_clip_state(seed)}, path)
    return path


def save_tiny_head(path: Path, dimension: int = EMBEDDING, seed: int = 0) -> Path:
    """Write a head of one layer."""
    generator = torch.Generator().manual_seed(seed)
    save_file({"weight": torch.randn(1, dimension, generator=generator), "bias": torch.tensor([5.0])}, path)
    return path

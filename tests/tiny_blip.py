"""A small BLIP with a head, random weights under the names of ImageReward's own code, and a small BERT vocabulary."""

from pathlib import Path

import torch

SIDE = 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "in", "the", "rain", "##s", "."]
HEAD = {
    0: (1024, 0),
    2: (128, 1024),
    4: (64, 128),
    6: (16, 64),
    7: (1, 16),
}  # out and in; the first takes the tower's width


def image_reward_shapes(
    image_width: int = 64, text_width: int = 128, blocks: tuple[int, int] = (2, 2), patch: int = 8, words: int = 15
) -> dict[str, tuple[int, ...]]:
    """Return every weight of ImageReward's checkpoint by its name, with `blocks` in the image and text tower."""
    side = SIDE if patch == 8 else 224
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, image_width),
        "blip.visual_encoder.pos_embed": (1, (side // patch) ** 2 + 1, image_width),
        "blip.visual_encoder.patch_embed.proj.weight": (image_width, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (image_width,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (words, text_width),
        "blip.text_encoder.embeddings.position_embeddings.weight": (512, text_width),
    }
    linear, norms = {}, ["blip.text_encoder.embeddings.LayerNorm"]
    for number in range(blocks[1]):
        layer = f"blip.text_encoder.encoder.layer.{number}"
        for attention, source in (("attention", text_width), ("crossattention", image_width)):
            linear |= {f"{layer}.{attention}.self.{part}": (text_width, source) for part in ("key", "value")}
            linear |= {
                f"{layer}.{attention}.{part}": (text_width, text_width) for part in ("self.query", "output.dense")
            }
            norms.append(f"{layer}.{attention}.output.LayerNorm")
        linear[f"{layer}.intermediate.dense"] = (4 * text_width, text_width)
        linear[f"{layer}.output.dense"] = (text_width, 4 * text_width)
        norms.append(f"{layer}.output.LayerNorm")
    shapes |= {f"{norm}.{part}": (text_width,) for norm in norms for part in ("weight", "bias")}
    norms = ["blip.visual_encoder.norm"]
    for number in range(blocks[0]):
        block = f"blip.visual_encoder.blocks.{number}"
        linear |= {
            f"{block}.attn.qkv": (3 * image_width, image_width),
            f"{block}.attn.proj": (image_width, image_width),
        }
        linear |= {
            f"{block}.mlp.fc1": (4 * image_width, image_width),
            f"{block}.mlp.fc2": (image_width, 4 * image_width),
        }
        norms += [f"{block}.norm1", f"{block}.norm2"]
    shapes |= {f"{norm}.{part}": (image_width,) for norm in norms for part in ("weight", "bias")}
    linear |= {f"mlp.layers.{number}": (out, into or text_width) for number, (out, into) in HEAD.items()}
    return shapes | {
        f"{name}.{part}": shape if part == "weight" else shape[:1]
        for name, shape in linear.items()
        for part in ("weight", "bias")
    }


def tiny_image_reward_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights. The head's are scaled so that scores are near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in image_reward_shapes().items():
        spread = shape[-1] ** -0.5 if name.startswith("mlp.") and len(shape) == 2 else 0.3
        state[name] = spread * torch.randn(shape, generator=generator)
    return state


def save_tiny_image_reward(path: Path, seed: int = 0) -> Path:
    """Write a checkpoint as on the hub: named weights, some of which the score does not need."""
    unused = {
        "blip.vision_proj.weight": torch.zeros(2, 64),
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
    }
    torch.save(tiny_image_reward_state(seed) | unused, path)
    return path


def save_tiny_bert_tokenizer(folder: Path) -> Path:
    """Write a tokenizer that splits as BERT's does and knows few words."""
    from transformers import BertTokenizer

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)
    return folder

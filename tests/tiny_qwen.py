"""A small Qwen2-VL with random weights, and a checkpoint of HPSv3 for it in the names that the authors' file has."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ray_ddpo.common.image_models.hps_v3_network import score_head
from tests.tiny_vlm import WORDS

TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<|video_pad|>", "<unk>"),
]
CALLED = {token: number for number, token in enumerate(TOKENS)}


def save_tiny_qwen(folder: Path) -> Path:
    """Write configuration and tokenizer of a small Qwen2-VL."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*TOKENS, *WORDS, "Visual", "Quality", "END"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(TOKENS)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", unk_token="<unk>", extra_special_tokens=TOKENS[1:7]
    ).save_pretrained(folder)
    tiny_qwen_config(len(vocabulary)).save_pretrained(folder)
    return folder


def tiny_qwen_config(vocabulary: int) -> Any:
    """Return the configuration of a small Qwen2-VL."""
    from transformers.models.qwen2_vl import Qwen2VLConfig

    text = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": vocabulary, "max_position_embeddings": 8192},
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0},
    }
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=CALLED["<|image_pad|>"],
        video_token_id=CALLED["<|video_pad|>"],
        vision_start_token_id=CALLED["<|vision_start|>"],
        vision_end_token_id=CALLED["<|vision_end|>"],
    )


def save_tiny_hps_v3(path: Path, qwen: Path, old_names: bool = True) -> Path:
    """Write a checkpoint with random weights: a language model, an image tower, a language head and the scoring head."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl import Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(tiny_qwen_config(len(AutoTokenizer.from_pretrained(qwen)) + 1))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if old_names:
        state = {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
            for name, value in state.items()
        }
    state |= {f"rm_head.{name}": value for name, value in score_head(32).state_dict().items()}
    save_file(state, path)
    return path

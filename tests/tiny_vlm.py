"""A small vision-language model and a small text encoder with random weights, as folders in the hub's format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
VOCABULARY = """a an the cat dog horse bird one two three red big small is are in this image of there what animal how
many photo with on grass sitting contains answer concisely going some only and no it"""
WORDS = VOCABULARY.split()
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE, PATCH = 32, 8


def tiny_tokenizer(template: str | None = None, words: Sequence[str] = WORDS) -> Any:
    """Return a tokenizer with one token per word, ignoring case and punctuation. `template` places special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [(word, vocabulary[word]) for word in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, extra_special_tokens=["<image>"], model_max_length=64
    )


def save_tiny_vlm(
    folder: Path, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, words: Sequence[str] = WORDS
) -> Path:
    """Write a LLaVA: CLIP's image tower, a projection, a Llama, and their processor."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(**SMALL, image_size=SIDE, patch_size=PATCH, projection_dim=16)
    text = LlamaConfig(**SMALL, vocab_size=len(SPECIAL) + len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=4))
    # Weights of the usual 0.02 would give nearly one answer for all images.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tiny_tokenizer("<s> $A", words),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder


def save_tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """Write a BERT for the same words."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(**SMALL, vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=48, pad_token_id=0)
    model = BertModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer("<s> $A </s>").save_pretrained(folder)
    return folder

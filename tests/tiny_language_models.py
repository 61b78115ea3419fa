"""Small language models with random weights that families of today encode prompts with, and their tokenizers."""

import itertools
from typing import Any

QWEN_IMAGE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
VISION_MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def tiny_qwen_tokenizer(template: str, length: int, marks: tuple[str, ...] = ()) -> Any:
    """Return a tokenizer of bytes, that reads the template's text before the prompt as `length` tokens, and 1 after it.

    Each of `marks` is a token as well.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    letters = sorted(ByteLevel.alphabet())
    tokenizer: Any = Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    before, after = template.split("{}")
    edges = [round(at * len(before) / length) for at in range(length + 1)]
    pieces = [before[start:stop] for start, stop in itertools.pairwise(edges)]
    tokenizer.add_special_tokens({"extra_special_tokens": [*dict.fromkeys(pieces), after, *marks]})
    return tokenizer


def tiny_chat_tokenizer(length: int) -> Any:
    """Return a tokenizer of bytes with a chat template that puts `length` tokens before a prompt, and 1 after it."""
    tokenizer = tiny_qwen_tokenizer(QWEN_IMAGE_TEMPLATE, length)
    template = QWEN_IMAGE_TEMPLATE.replace("{}", "{{ message['content'] }}")
    tokenizer.chat_template = f"{{% for message in messages %}}{template}{{% endfor %}}"
    return tokenizer


def tiny_mistral_tokenizer() -> Any:
    """Return a tokenizer of letters with a chat template that puts 5 tokens before a prompt, and 1 after it."""
    from transformers import LlamaTokenizerFast

    letters = ["▁", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    names = ("<unk>", "<s>", "</s>", "[SYSTEM]", "[ABOUT]", "[INST]", "[PROMPT]", "[/INST]", *letters)
    tokenizer: Any = LlamaTokenizerFast(
        vocab={name: index for index, name in enumerate(names)}, merges=[], add_prefix_space=False
    )
    tokenizer.add_special_tokens({"pad_token": "<unk>", "extra_special_tokens": list(names[3:8])})
    tokenizer.chat_template = "<s>[SYSTEM][ABOUT][INST][PROMPT]{{ messages[1]['content'][0]['text'] }}[/INST]"
    return tokenizer


def tiny_mistral3(width: int, vocabulary: int) -> Any:
    """Return a model with the 30 layers that the pipeline reads states of."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text: Any = {"model_type": "mistral", "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 31}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": vocabulary}
    vision: Any = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def tiny_qwen3(width: int, vocabulary: int, layers: int = 2, with_head: bool = False) -> Any:
    """Return a Qwen3, with the head that predicts tokens or without."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    keys: Any = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers}
    keys |= {"vocab_size": vocabulary, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return (Qwen3ForCausalLM if with_head else Qwen3Model)(Qwen3Config(**keys))


def tiny_qwen_vl(width: int, tokenizer: Any, layers: int = 1) -> Any:
    """Return a Qwen2.5-VL. Where the tokenizer has a token for images, the model sees them."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: Any = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers}
    text |= {"vocab_size": len(tokenizer), "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision: Any = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    named = tokenizer.get_added_vocab()
    marks = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
    marks |= {"vision_end_token_id": "<|vision_end|>"}
    ids: Any = {key: named[mark] for key, mark in marks.items() if mark in named}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))

"""HPSv3's network: Qwen2-VL without its language head, and a small head that scores the hidden state of one token.

Written after the authors' code (MizzenAI/HPSv3, MIT: `hpsv3/inference.py`, `hpsv3/model/qwen2vl_trainer.py` and
`hpsv3/dataset/data_collator_qwen.py`), whose package needs torchvision, trl, deepspeed and others.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from ray_ddpo.common.image_models.weight_file import named_weights
from ray_ddpo.common.model_files.model_hub import Weights, cannot_load, read_pretrained
from ray_ddpo.common.model_files.pretrained import read_tokenizer

REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
# Tokens that a prompt must not have: they would be read as an image, or as the end of the prompt.
OWN_TOKENS = (REWARD_TOKEN, IMAGE_TOKEN, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>")
PIXELS = 256 * 28 * 28  # of an image after resizing, at most: 256 tokens of 28 × 28 pixels
# The prompt that the network was trained with, to the last space: lines are joined at the backslashes.
INSTRUCTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score \
to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best.\x20

**Visual Quality:** \x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body \
structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, \
with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., \
hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, \
atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult \
material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

**Text Alignment:** \x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with \
the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image \
adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically \
fit the scenario described in the prompt. The environment should support and enhance the subject without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, \
expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical \
attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The \
generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {prompt}



Please provide the overall ratings of this image: <|Reward|>

END
"""


def resized_size(height: int, width: int, unit: int, pixels: int = PIXELS) -> tuple[int, int]:
    """Return the size to which an image is resized: multiples of `unit`, near `pixels` in all, and of the same shape.

    This is `smart_resize` of qwen-vl-utils with equal lower and upper limit. Theirs refuses an image of which one side is
    over 200 times the other.
    """
    tall, wide = (max(unit, round(side / unit) * unit) for side in (height, width))
    if tall * wide == pixels:
        return tall, wide
    scale = math.sqrt(pixels / (height * width))
    rounded = math.floor if tall * wide > pixels else math.ceil
    tall, wide = (max(unit, rounded(side * scale / unit) * unit) for side in (height, width))
    return tall, wide


def score_head(width: int) -> nn.Sequential:
    """Return the head from a hidden state to mean and deviation of the preference."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


@dataclass(frozen=True)
class HpsV3Network:
    """The loaded network with its tokenizer and image processor."""

    backbone: Any  # Qwen2VLModel
    head: nn.Sequential  # in float32
    tokenizer: Any
    processor: Any  # of images
    device: str

    @torch.no_grad()
    def scores(self, images: UInt8[np.ndarray, "B H W 3"], prompts: list[str]) -> Float[Tensor, "B"]:
        """Return the mean of the preference, the first output of the head at the reward token.

        Raises:
            ValueError: a prompt has one of the model's own tokens, or the images are too long.
        """
        config = self.backbone.config.vision_config
        height, width = resized_size(*images.shape[1:3], unit=config.patch_size * config.spatial_merge_size)
        pil_images = [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in images]
        pixels = self.processor(pil_images, return_tensors="pt", do_resize=False)
        grid = pixels["image_grid_thw"].to(self.device)
        tokens_per_image = int(grid[0].prod()) // config.spatial_merge_size**2
        texts = [_conversation(prompt, tokens_per_image) for prompt in prompts]
        rows = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        ids, mask = rows["input_ids"].to(self.device), rows["attention_mask"].to(self.device)
        # The authors' forward pass gives no token numbers to the backbone, so that all tokens, also those of the image,
        # have consecutive positions. Qwen2-VL's own positions of rows and columns would be another network.
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1).expand(3, -1, -1)
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=pixels["pixel_values"].to(self.device, self.backbone.dtype),
            image_grid_thw=grid,
            use_cache=False,
        )[0]
        reward_id = self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        at = (ids == reward_id).int().argmax(-1)
        return self.head(hidden[torch.arange(len(ids), device=self.device), at].float())[:, 0]


def _conversation(prompt: str, image_tokens: int) -> str:
    """Return the chat template of Qwen2-VL around the instruction. Raise ValueError if the prompt has its tokens."""
    if own := [token for token in OWN_TOKENS if token in prompt]:
        raise ValueError(f"the prompt {prompt[:200]!r} has {own}, which HPSv3 reads as tokens of its own")
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{IMAGE_TOKEN * image_tokens}<|vision_end|>{INSTRUCTION.replace('{prompt}', prompt)}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def load_hps_v3(checkpoint: str | Path, model: Weights, dtype: torch.dtype, device: str) -> HpsV3Network:
    """Load the network.

    Args:
        checkpoint: HPSv3's file of weights.
        model: the folder or hub name of Qwen2-VL, for its configuration and tokenizer.
        dtype: of the backbone.
        device: where it computes.

    Raises:
        ValueError: a file is missing, or the checkpoint is not of this network.
    """
    from accelerate import init_empty_weights
    from transformers import AddedToken, AutoConfig, AutoTokenizer
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil, Qwen2VLModel

    def read(place: Any, local_files_only: bool) -> Any:
        return AutoConfig.from_pretrained(place, local_files_only=local_files_only, trust_remote_code=False)

    config = read_pretrained(model.source, read, cannot_load(model))
    if config.model_type != "qwen2_vl":
        raise ValueError(f"{model.key} is {model.source!r}, a {config.model_type}: HPSv3 needs a qwen2_vl")
    tokenizer = read_tokenizer(AutoTokenizer, model)
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True, normalized=False)], special_tokens=True)
    state = {renamed(name): value for name, value in named_weights(checkpoint, "the checkpoint", ".pth").items()}
    embeddings = state.get("backbone.language_model.embed_tokens.weight")
    if embeddings is None or len(embeddings) <= tokenizer.convert_tokens_to_ids(REWARD_TOKEN):
        raise ValueError(f"the checkpoint {checkpoint} has no embedding of {REWARD_TOKEN}: it is not HPSv3's")
    config.text_config.vocab_size = len(embeddings)  # the authors cut the unused rows off
    with init_empty_weights(include_buffers=False):
        network = nn.ModuleDict({"backbone": Qwen2VLModel(config), "head": score_head(config.text_config.hidden_size)})
    state.pop("lm_head.weight", None)
    of_dtype = {name: value.to(torch.float32 if name.startswith("head.") else dtype) for name, value in state.items()}
    try:
        network.load_state_dict(of_dtype, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint {checkpoint} does not fit the configuration of {model.source}: {str(error)[:300]}"
        ) from None
    network.eval().requires_grad_(False).to(device)
    processor = Qwen2VLImageProcessorPil(
        patch_size=config.vision_config.patch_size,
        temporal_patch_size=config.vision_config.temporal_patch_size,
        merge_size=config.vision_config.spatial_merge_size,
    )
    return HpsV3Network(network["backbone"], network["head"], tokenizer, processor, device)  # type: ignore[arg-type]


def renamed(name: str) -> str:
    """Return a weight's name in our network, from transformers' names before or since version 4.52."""
    if name.startswith("rm_head."):
        return name.replace("rm_head.", "head.", 1)
    if name.startswith("visual."):
        return f"backbone.{name}"
    if name.startswith(("model.visual.", "model.language_model.")):
        return name.replace("model.", "backbone.", 1)
    return name.replace("model.", "backbone.language_model.", 1) if name.startswith("model.") else name

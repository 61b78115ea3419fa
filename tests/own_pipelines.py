"""Calls of the families' own pipelines, with which tests compare what the program samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from tests.tiny_families import SAFETY_CHECKED, VIDEO, given_latents, take_first_order_steps

# Families whose pipelines take all images of a call as those of one prompt.
ONE_AT_A_TIME = ("qwen_image_edit", "qwen_image_edit_plus", "flux2_edit", "flux2_klein_edit")


def own_pipeline(name: str, config: DiffusersConfig, model: Path | str, first_order: bool = True) -> Any:
    """Load a model with its pipeline class, which takes steps of `first_order`. Parts that need torchvision are given."""
    keys: dict[str, Any] = {"safety_checker": None} if name in SAFETY_CHECKED else {}
    pipeline_class: Any = getattr(diffusers, config.pipeline_class)
    pipeline = pipeline_class.from_pretrained(model, **keys, **config.made_parts(Path(model)))
    if first_order:
        take_first_order_steps(name, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def own_call(name: str, pipeline: Any, prompts: Sequence[str], latents: torch.Tensor | None, **keys: Any) -> list[Any]:
    """Return a pipeline's images of prompts: PIL images or lists of frames, or latents if `output_type` says so.

    Args:
        name: the family's.
        pipeline: of the family.
        prompts: one per image.
        latents: the noise, one row per image, as samplers have it. None: the pipeline's own.
        keys: of the call; lists have one value per image.
    """
    if name == "hunyuan_image":  # these are no arguments of its call
        pipeline.tokenizer_max_length, scale = keys.pop("max_sequence_length"), max(keys.pop("guidance_scale"), 1.0)
        pipeline.guider = pipeline.ocr_guider = diffusers.ClassifierFreeGuidance(guidance_scale=scale)
    if name not in ONE_AT_A_TIME:
        given = None if latents is None else given_latents(name, latents)
        sampled = pipeline(prompt=list(prompts), latents=given, **keys)
        return list(sampled.frames if name in VIDEO else sampled.images)
    assert latents is not None, "such a pipeline steps by a flow"
    found = []
    for row, prompt in enumerate(prompts):
        own = {key: value[row] if isinstance(value, list) else value for key, value in keys.items()}
        image = own["image"]
        with sizes_as_given((image[0] if isinstance(image, list) else image).size):
            noise = given_latents(name, latents[row : row + 1])
            found += list(pipeline(prompt=prompt, latents=noise, **own).images)
    return found


@contextmanager
def sizes_as_given(size: tuple[int, int]) -> Iterator[None]:
    """Let pipelines encode an image at its own size: Qwen-Image-Edit's take 1024² pixels, and FLUX.2's no small images.

    Args:
        size: width and height in pixels.
    """
    known = pipeline_qwenimage_edit_plus.calculate_dimensions

    def dimensions(area: int, ratio: float) -> tuple[int, int]:
        return known(area, ratio) if area == pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE else size

    with (
        patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (*size, None)),
        patch.object(pipeline_qwenimage_edit_plus, "calculate_dimensions", dimensions),
        patch.object(Flux2ImageProcessor, "check_image_input", lambda _, image: image),
    ):
        yield

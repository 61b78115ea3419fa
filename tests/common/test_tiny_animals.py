"""The embedded model is a plain Stable Diffusion folder: it loads, it is small, it samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

COMMON = Path(__file__).parents[2] / "common"
MODEL = COMMON / "tiny_animals"
ANIMALS = (COMMON / "prompt_lists" / "animals.txt").read_text().split()


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_parameters_are_float32_where_float32_is_asked_for(pipeline):
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}


def test_scheduler_is_stable_diffusions(pipeline):
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    expected = {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
    }
    assert expected.items() <= dict(pipeline.scheduler.config).items()


def test_folder_holds_at_most_12_megabytes():
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 12e6


def test_each_of_the_45_animals_is_one_token(pipeline):
    assert len(set(ANIMALS)) == 45
    tokens = [tuple(pipeline.tokenizer(animal).input_ids) for animal in ANIMALS]
    assert {len(ids) for ids in tokens} == {3}  # start, animal, end
    assert len(set(tokens)) == 45


@pytest.mark.parametrize("text", ["", "a photo of a cat", "naïve 猫 zq!"])
def test_any_text_becomes_tokens_that_the_text_encoder_knows(pipeline, text):
    ids = pipeline.tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == pipeline.tokenizer.model_max_length
    assert max(ids) < pipeline.text_encoder.config.vocab_size


def test_a_sampled_animal_is_64_pixels_per_side_on_white(pipeline):
    generator = torch.Generator().manual_seed(0)
    image = pipeline("fox", num_inference_steps=10, guidance_scale=3.0, generator=generator, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.mean(corners) > 0.9
    assert image.min() < 0.5


def test_no_safety_checker_is_asked_for():
    pipeline_config = StableDiffusionPipeline.load_config(MODEL)
    assert pipeline_config["safety_checker"] == [None, None]
    assert pipeline_config["requires_safety_checker"] is False

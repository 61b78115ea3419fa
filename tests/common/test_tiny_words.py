"""The embedded model that writes is a plain Stable Diffusion 3 folder: it loads, it is small, it is right now and then."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from benchmarks.tiny_words import SETS, load_pipeline, sample
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS
from ray_ddpo.common.prompt_set import shipped_prompts

MODEL = EMBEDDED_MODELS["tiny_words"]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return load_pipeline(MODEL)


def test_parts_are_diffusers_own_and_float32_where_float32_is_asked_for(pipeline):
    modules = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae)
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)


def test_folder_holds_at_most_12_megabytes():
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 12e6


def test_a_word_in_capitals_is_read_letter_by_letter_and_a_known_word_at_once(pipeline):
    tokens = pipeline.tokenizer.tokenize('a sign that says "RED"')
    assert [token.removesuffix("</w>") for token in tokens] == ["a", "sign", "that", "says", '"', "r", "e", "d", '"']
    assert pipeline.tokenizer.tokenize("two red circles") == ["two", "red", "circles"]


@pytest.mark.parametrize("name", ["words", "shapes"])
def test_no_shipped_prompt_is_cut(pipeline, name):
    for half in ("train", "test"):
        for prompt in shipped_prompts(name, half):
            assert len(pipeline.tokenizer(prompt.text).input_ids) <= pipeline.tokenizer.model_max_length


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("name", ["words", "shapes"])
def test_test_prompts_are_right_often_and_not_always(pipeline, name):
    prompts = shipped_prompts(name, "test")[:: 3 if name == "words" else 2]
    images = sample(pipeline, prompts, seed=0, num_steps=8, guidance_scale=1.0)
    scores = SETS[name].load("cpu")(images, [p.text for p in prompts], [p.metadata for p in prompts])
    assert 0.15 <= np.mean(scores) <= 0.9


def test_no_model_folder_lacks_its_card():
    assert all((Path(folder) / "README.md").exists() for folder in EMBEDDED_MODELS.values())


def test_no_configuration_names_a_folder_of_the_training():
    files = [file for folder in EMBEDDED_MODELS.values() for file in Path(folder).rglob("*.json")]
    assert len(files) > 10 and [str(file) for file in files if '"_name_or_path"' in file.read_text()] == []

"""python -m benchmarks.tiny_words: how often the model that writes is right, by category, and a sheet of images."""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float, UInt8
from PIL import Image

from ray_ddpo.actors.rewards.geneval import GenEval
from ray_ddpo.actors.rewards.ocr import Ocr
from ray_ddpo.common.prompt_set import shipped_prompts
from ray_ddpo.common.prompts import Prompt

MODEL = Path("common/tiny_words")
COLUMNS, ROWS = 16, 4  # of each half of the sheet
SETS = {"words": Ocr(measure="strict"), "shapes": GenEval(measure="strict", detector="shapes")}


def load_pipeline(model: Path = MODEL) -> StableDiffusion3Pipeline:
    """Load the pipeline in float32. It has no T5."""
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        model, torch_dtype=torch.float32, use_safetensors=True, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: StableDiffusion3Pipeline, prompts: list[Prompt], seed: int, num_steps: int, guidance_scale: float
) -> UInt8[np.ndarray, "B 64 64 3"]:
    """Sample an image a prompt by Euler's method. Image i has the noise of seed + i."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    images = pipeline(
        [prompt.text for prompt in prompts],
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        generator=generators,
        max_sequence_length=1,
        output_type="np",
        return_dict=False,
    )[0]
    return (np.asarray(images) * 255).round().astype(np.uint8)


def by_tag(prompts: list[Prompt], scores: Float[np.ndarray, "N"]) -> dict[str, float]:
    """Return the mean score of each category and of all."""
    groups: Mapping[str, list[float]] = defaultdict(list)
    for prompt, score in zip(prompts, scores, strict=True):
        groups[prompt.metadata["tag"]].append(float(score))
    return {tag: float(np.mean(values)) for tag, values in groups.items()} | {"all": float(scores.mean())}


def main() -> None:
    """Sample the test prompts of both sets, print a table, and save a sheet."""
    parser = argparse.ArgumentParser(description="Accuracy of the model that writes on the test prompts.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_pipeline(options.model)
    halves = []
    for name, reward in SETS.items():
        prompts = shipped_prompts(name, options.split) * options.seeds
        images = sample(pipeline, prompts, 0, options.steps, options.guidance)
        texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        scores = reward.load("cpu")(images, texts, metadata)
        print(name, ", ".join(f"{tag} {mean:.3f}" for tag, mean in by_tag(prompts, scores).items()), flush=True)
        shown = np.linspace(0, len(images) - 1, COLUMNS * ROWS).astype(int)
        halves += [np.concatenate(images[row], axis=1) for row in shown.reshape(ROWS, COLUMNS)]
    if options.sheet:
        Image.fromarray(np.concatenate(halves)).save(options.sheet)


if __name__ == "__main__":
    main()

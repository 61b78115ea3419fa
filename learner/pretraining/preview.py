"""Preview the embedded model: a sheet with an image of each animal, and the loss curve.

python -m ray_ddpo.learner.pretraining.preview --model common/tiny_animals --output sheet.png
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from ray_ddpo.learner.pretraining.drawings import prompted_animals

COLUMNS = 9
CAPTION_HEIGHT = 12


def load_pipeline(model: Path) -> StableDiffusionPipeline:
    """Load the pipeline in float32, without progress bars and warnings."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_images(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, guidance_scale: float = 4.0
) -> UInt8[np.ndarray, "B 64 64 3"]:
    """Sample an image per prompt, by 20 DDIM steps with eta 1. Image i has the noise of seed + i."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    sampling = {"num_inference_steps": 20, "eta": 1.0, "guidance_scale": guidance_scale, "generator": generators}
    images = pipeline(prompts, output_type="np", return_dict=False, **sampling)[0]
    return (np.asarray(images) * 255).round().astype(np.uint8)


def save_sheet(model: Path, animals: list[str], file: Path, seed: int = 0) -> None:
    """Save a sheet with one captioned image of each animal."""
    images = sample_images(load_pipeline(model), animals, seed)
    cell = images.shape[1] + CAPTION_HEIGHT
    sheet = Image.new("RGB", (COLUMNS * images.shape[2], -(-len(animals) // COLUMNS) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (animal, image) in enumerate(zip(animals, images, strict=True)):
        left, top = index % COLUMNS * images.shape[2], index // COLUMNS * cell
        pen.text((left + 2, top), animal, fill="gray")
        sheet.paste(Image.fromarray(image), (left, top + CAPTION_HEIGHT))
    sheet.save(file)


def save_loss_curve(losses: list[float], steps_a_loss: int, file: Path) -> None:
    """Save the curve of the noise's mean squared error over optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([steps_a_loss * (index + 1) for index in range(len(losses))], losses, linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="mean squared error of the noise", ylim=(0, min(1.0, max(losses))))
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A sheet with an image of each animal.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    save_sheet(options.model, prompted_animals(), options.output, options.seed)

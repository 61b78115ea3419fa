"""make edit-grey: train a tiny inpainting model to fill half of a plain image with the grey of its other half.

The network has random weights, and only its input image says which grey is right. The control samples each held-out
prompt with the input image of another one: a model that reads its input then scores worse.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from benchmarks.timing import machine
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.rollout import inputs_of, sample_trajectories
from ray_ddpo.common.input_images import InputImages
from ray_ddpo.common.prompts import File
from ray_ddpo.common.recipe.overrides import with_overrides
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.runtime import settle
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.train import run_training
from tests.tiny_pipeline import save_tiny_inpainting

SIDE = 16  # pixels of an image
TRAINED, HELD_OUT = range(32), range(1000, 1064)  # numbers of input images
DECODER_STEPS = 400


def save_plain_images(folder: Path, numbers: range) -> Path:
    """Write images of one grey each and a mask of their left half, with a file of prompts beside them. Return that file."""
    folder.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, : SIDE // 2] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    lines = []
    for number in numbers:
        grey = int(np.random.default_rng(number).integers(0, 256))
        Image.new("RGB", (SIDE, SIDE), (grey,) * 3).save(folder / f"{number}.png")
        lines.append(json.dumps({"prompt": "fill it", "image": f"{number}.png", "mask": "mask.png"}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder / "prompts.jsonl"


def likeness(
    images: UInt8[np.ndarray, "B H W 3"], prompts: list[str], metadata: list[dict[str, Any]], inputs: InputImages
) -> Float[np.ndarray, "B"]:
    """Return minus the mean difference to the input image inside the mask, from −1 to 0."""
    difference = np.abs(images.astype(np.float32) - inputs.pixels).mean(axis=3) / 255
    return -np.array([row[mask].mean() for row, mask in zip(difference, inputs.masks, strict=True)], np.float32)


def save_painter(folder: Path, steps: int = DECODER_STEPS) -> Path:
    """Write a tiny inpainting model. Its network has random weights, and its decoder is fitted to grey halves."""
    from diffusers import AutoencoderTiny

    save_tiny_inpainting(folder, prediction_type="v_prediction")
    torch.manual_seed(0)
    sides: Any = {f"{side}_block_out_channels": (16,) * 4 for side in ("encoder", "decoder")}
    sides |= {f"num_{side}_blocks": (0,) * 4 for side in ("encoder", "decoder")}
    vae: Any = AutoencoderTiny(**sides)  # 2 × 2 latents an image, so that noise changes its grey
    optimizer = torch.optim.Adam(vae.parameters(), lr=4e-3)
    for _ in range(steps):
        halves = torch.rand(32, 1, 1, 2).repeat_interleave(SIDE, 2).repeat_interleave(SIDE // 2, 3)
        pixels = 2 * halves.expand(-1, 3, -1, -1) - 1
        latents = vae.encode(pixels).latents
        decoded = vae.decode(latents + 0.1 * torch.randn_like(latents)).sample
        loss = (decoded - pixels).square().mean() + 0.01 * (latents.square().mean() - 1).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.save_pretrained(folder / "vae")
    return folder


def recipe_of(folder: Path, seed: int, overrides: list[str]) -> Recipe:
    """Return the recipe of one run in `folder`, which has model and input images."""
    prompts = {"name": "file", "column": "prompt", "image_column": "image", "mask_column": "mask"}
    tables = {
        "name": f"seed{seed}",
        "seed": seed,
        "output_dir": str(folder / "runs"),
        "rounds": 60,
        "policy": {"name": "sd_inpainting", "model": str(folder / "model"), "train": "full", "resolution": SIDE},
        "prompts": {**prompts, "path": str(folder / "trained" / "prompts.jsonl"), "images_per_prompt": 8},
        "sampling": {"num_steps": 4, "guidance_scale": 1.0, "batch_size": 64, "batches_per_round": 2},
        "reward": {"name": "function", "path": "benchmarks.edit_grey:likeness"},
        "algorithm": {"name": "grpo", "clip_range": 1e-2},
        "learner": {"batch_size": 32, "micro_batch_size": 128, "learning_rate": 1e-3},
        "runtime": {"device": "cpu"},
    }
    return Recipe.parse(with_overrides(tables, overrides, Recipe))


def held_out_scores(policy: Policy, recipe: Recipe, file: Path) -> Iterator[Float[np.ndarray, "B"]]:
    """Yield the scores of held-out edits, and of edits that were sampled with the input image of another prompt."""
    prompts = File(path=str(file), image_column="image", mask_column="mask").sampled()
    inputs, count = inputs_of(policy, prompts), len(prompts)
    assert inputs is not None, "the family reads input images"
    for shift in (0, 1):
        shown = inputs.select(np.roll(range(count), shift).tolist())
        texts, seeds = [prompt.text for prompt in prompts], list(range(count))
        sampled = sample_trajectories(policy, texts, seeds, recipe.sampling, inputs=shown)
        yield likeness(policy.decode(sampled.final_latents).numpy(), texts, [], inputs)


def in_errors(changes: Float[np.ndarray, "B"]) -> float:
    """Return the mean of paired differences, in standard errors."""
    return float(changes.mean() / (changes.std(ddof=1) / len(changes) ** 0.5))


def trained_scores(folder: Path, seed: int, overrides: list[str]) -> list[Float[np.ndarray, "B"]]:
    """Train one run. Return the held-out scores before it and after it, and those of the control after it."""
    recipe, held_out = recipe_of(folder, seed, overrides), folder / "held_out" / "prompts.jsonl"
    policy = build_components(recipe).policy.load(settle(recipe.runtime), recipe.sampling, "sampler")
    before, _ = held_out_scores(policy, recipe, held_out)
    run_training(recipe, serial=True)
    policy.restore(Path(recipe.run_path()) / "unet")
    return [before, *held_out_scores(policy, recipe, held_out)]


def main() -> None:
    """Print a row for each seed. Unknown options override the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/edit-grey"))
    options, overrides = parser.parse_known_args()
    save_painter(options.folder / "model")
    save_plain_images(options.folder / "trained", TRAINED)
    save_plain_images(options.folder / "held_out", HELD_OUT)
    print(machine())
    rows = ["| seed | before | after | change in paired standard errors | with other inputs | change from after |"]
    rows += ["|---|---|---|---|---|---|"]
    for seed in options.seeds:
        before, after, control = trained_scores(options.folder, seed, overrides)
        means = [f"{scores.mean():.3f}" for scores in (before, after, control)]
        gain, loss = in_errors(after - before), in_errors(control - after)
        rows.append(f"| {seed} | {means[0]} | {means[1]} | {gain:+.1f} | {means[2]} | {loss:+.1f} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

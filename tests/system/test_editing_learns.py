"""A tiny editing run that learns: the network is trained to paint an image in the grey of its input image."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.train import run_training
from tests.input_files import input_table
from tests.tiny_families import policy_table, save_tiny_flux_kontext

INPUTS, HELD_OUT = 24, 8


def save_greys(folder: Path) -> None:
    """Write input images of one grey each, from dark to light, a third of them for evaluation."""
    folder.mkdir()
    rows = []
    for number in range(INPUTS):
        level = int(60 + 135 * ((number * 7) % INPUTS) / (INPUTS - 1))
        Image.new("RGB", (16, 16), (level, level, level)).save(folder / f"{number}.png")
        rows.append(json.dumps({"prompt": "keep it", "image": f"{number}.png"}))
    (folder / "train.jsonl").write_text("\n".join(rows[:-HELD_OUT]))
    (folder / "held_out.jsonl").write_text("\n".join(rows[-HELD_OUT:]))


def greys(rows: list[dict]) -> np.ndarray:
    """Return the mean grey of each row's image and of its input image."""
    pictures = [
        (Image.open(io.BytesIO(row["pixels"])), Image.open(json.loads(row["metadata"])["image"])) for row in rows
    ]
    return np.array([[np.asarray(each).mean() for each in pair] for pair in pictures])


@pytest.mark.thorough
def test_an_editing_run_learns_on_held_out_input_images(tmp_path: Path) -> None:
    save_greys(tmp_path / "inputs")
    prompts = input_table(tmp_path / "inputs" / "train.jsonl") | {"images_per_prompt": 8}
    tables = {
        "name": "greys",
        "output_dir": str(tmp_path / "runs"),
        "rounds": 30,
        "policy": policy_table("flux_kontext", save_tiny_flux_kontext(tmp_path / "model"), train="full"),
        "prompts": prompts | {"held_out_path": str(tmp_path / "inputs" / "held_out.jsonl")},
        "sampling": {"num_steps": 4, "eta": 0.7, "batch_size": 32, "batches_per_round": 2},
        "reward": {"name": "edit_preservation"},
        "algorithm": {"name": "grpo", "clip_range": 1e-2},
        "learner": {"batch_size": 32, "micro_batch_size": 48, "learning_rate": 1e-3},
        "evaluation": {"images": 64, "batch_size": 32},
    }
    recipe = Recipe.parse(tables)
    run_training(recipe, serial=True)
    output = tmp_path / "evaluation"
    assert cli.main(["evaluate", recipe.run_path(), "--output", str(output)]) == 0
    found = json.loads((output / "evaluation.json").read_text())["weights"][recipe.run_path()]["edit_preservation"]
    assert found["change"] > 3 * found["paired_standard_error"] > 0
    rows = parquet.read_table(output / "images.parquet").to_pylist()
    after = greys([row for row in rows if row["variant"] == recipe.run_path()])
    before = greys([row for row in rows if row["variant"] == "pretrained"])
    assert np.abs(after[:, 0] - after[:, 1]).mean() < np.abs(before[:, 0] - before[:, 1]).mean()

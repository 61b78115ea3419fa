"""make size-check: train Stable Diffusion 1.5 at 512 × 512 with random weights through Ray, on CPUs.

The run has two rounds, checkpoints, a held-out evaluation and a report. It shows that the published architecture fits
and works from end to end; it says nothing about images. Two cores need about 25 minutes and 16 GB of memory.
`--tiny` does the same with a model of a few thousand parameters.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors.numpy import load_file

from benchmarks.random_stable_diffusion import save_random_pipeline
from benchmarks.timing import machine

NAME, ROUNDS = "size_check", 2


def recipe_tables(model: Path, output_dir: Path) -> dict[str, Any]:
    """Return a recipe with rounds as small as they can be: two images, two denoising steps, guidance."""
    return {
        "name": NAME,
        "output_dir": str(output_dir),
        "rounds": ROUNDS,
        "policy": {"name": "stable_diffusion", "model": str(model), "lora": {"rank": 4, "alpha": 4}},
        "prompts": {"name": "animals"},
        "sampling": {"num_steps": 2, "guidance_scale": 5.0, "batch_size": 1, "batches_per_round": 2},
        "reward": {"name": "jpeg_compressibility"},
        "algorithm": {"name": "ddpo_is", "clip_range": 1e-4},
        "learner": {"batch_size": 2, "micro_batch_size": 1, "learning_rate": 3e-4},
        "checkpoint": {"every": 1},
        "evaluation": {"every": ROUNDS, "images": 2, "batch_size": 1},
    }


def problems(run: Path) -> list[str]:
    """Return what a finished run lacks: rounds, checkpoint, evaluations, report, or LoRA weights that moved."""
    found = []
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if [row["round"] for row in rounds] != list(range(ROUNDS)):
        found.append(f"metrics.jsonl has the rounds {[row['round'] for row in rounds]}")
    if not (run / "checkpoints" / f"round-{ROUNDS:06d}" / "manifest.json").is_file():
        found.append(f"there is no checkpoint of round {ROUNDS}")
    if len((run / "evaluations.jsonl").read_text().splitlines()) != 2:
        found.append("evaluations.jsonl does not have the versions 0 and 2")
    found += [f"report/{name} is missing" for name in ("report.html",) if not (run / "report" / name).is_file()]
    lora = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    if not all(np.isfinite(value).all() for value in lora.values()):
        found.append("the LoRA is not finite")
    if not any(np.abs(value).max() > 0 for name, value in lora.items() if "lora_B" in name or "lora.up" in name):
        found.append("the LoRA has not moved")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Save the model, train, report, and check the run's files. Return 1 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/size-check"), help="folder; an existing one is replaced"
    )
    parser.add_argument("--tiny", action="store_true", help="images of 16 × 16 instead of 512 × 512")
    options, overrides = parser.parse_known_args(arguments)
    shutil.rmtree(options.output, ignore_errors=True)
    model = save_random_pipeline(options.output / "model", "tiny" if options.tiny else "sd15")
    recipe = options.output / "recipe.toml"
    recipe.write_text(tomli_w.dumps(recipe_tables(model, options.output)))
    run, started = options.output / NAME, time.monotonic()
    for command in (["train", str(recipe), *overrides], ["report", str(run)]):
        subprocess.run([sys.executable, "-m", "ray_ddpo", *command], check=True)
    found = problems(run)
    print(f"{machine()}: {time.monotonic() - started:.0f} s, {'; '.join(found) or 'complete'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

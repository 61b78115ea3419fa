"""make bench-gpu: measure Stable Diffusion 1.5 with random weights on one GPU, beside TRL and the GPU's own limits.

Needs neither network nor Ray: `python -m benchmarks.gpu`. TRL runs in the Python that `--trl-python` names.
Each section is written to the folder as soon as it ends; sections that still run after `--seconds` are stopped.
`--only` chooses sections, so that missing ones can be measured later. `--tiny --device cpu` runs the same code anywhere.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_tables import markdown
from benchmarks.random_stable_diffusion import save_random_pipeline
from benchmarks.round_process import RoundProcess
from benchmarks.stable_diffusion_work import work_of_a_row
from benchmarks.timing import machine, median_seconds
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import components_of
from tests.parity.sides import trl_config

RECIPE = "deploy/recipes/sd15_compressibility.toml"
SCRIPTS = Path(__file__).parent
# TRL's example has 6 images a sampling batch and 3 a training batch; the others are as large as an 80 GB GPU takes.
TRL_SIZES = {"TRL, its example's batches": (6, 3), "TRL, largest batches": (16, 8)}
SIZES = (16, 8)  # ours: images a task, transitions a micro-batch
NOT_DETERMINISTIC = ["--runtime.deterministic", "false"]  # as TRL runs
COMPILED = ["--policy.compile", "both", "--algorithm.off_policy.ratio", "proximal"]
OURS: dict[str, list[str]] = {
    "ours, compiled, not deterministic": COMPILED + NOT_DETERMINISTIC,
    "ours, not deterministic": NOT_DETERMINISTIC,
    "ours, eager": [],
    "ours, compiled": COMPILED,
}


@dataclass(frozen=True)
class Job:
    """The benchmark's model, sizes and output folder."""

    folder: Path
    model: Path
    device: str
    trl_python: str
    steps: int
    images: int
    tiny: bool
    ends: float  # by the monotonic clock

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return max(1.0, self.ends - time.monotonic())

    def recipe(self, *overrides: str) -> list[str]:
        """Return overrides of `RECIPE`: this model, and one optimizer step on all images of a round."""
        size, micro_batch = (4, 2) if self.tiny else SIZES
        values = {
            "policy.model": str(self.model),
            "policy.dtype": "bfloat16",
            "sampling.num_steps": self.steps,
            "sampling.batch_size": size,
            "sampling.batches_per_round": self.images // size,
            "learner.batch_size": self.images,
            "learner.gradient_accumulation_steps": 1,
            "learner.micro_batch_size": micro_batch,
            "runtime.device": self.device,
            "runtime.threads": 8 if self.device == "cuda" else 1,
            "evaluation.every": 0,
        }
        return [word for key, value in values.items() for word in (f"--{key}", str(value))] + list(overrides)

    def write(self, section: str, found: Any) -> None:
        """Append the result of a section to the answers."""
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps({"section": section, "found": found}) + "\n")
        print(f"[{time.strftime('%H:%M:%S')}] {section}: {json.dumps(found)[:600]}", flush=True)


def device_section(job: Job) -> dict[str, Any]:
    """Measure the device's matrix and copy rates, and count the operations of one row of the network."""
    side, numbers = (8192, 2**29) if job.device == "cuda" else (512, 2**22)
    left, right = (torch.randn(side, side, device=job.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(numbers, device=job.device, dtype=torch.bfloat16)
    goal = torch.empty_like(source)
    taken, copied = median_seconds(lambda: left @ right, 20), median_seconds(lambda: goal.copy_(source), 20)
    config = StableDiffusion(model=str(job.model), dtype="bfloat16")
    rates = {"flops": 2 * side**3 / taken, "copied": 2 * source.nbytes / copied}
    return {**rates, **work_of_a_row(config), "machine": machine()}


def trl_section(job: Job, sizes: tuple[int, int]) -> dict[str, Any]:
    """Time two rounds of TRL and report the second."""
    sampled, trained = (4, 2) if job.tiny else sizes
    components = components_of(Recipe.load(RECIPE, job.recipe()))
    batches = max(1, job.images // (2 * sampled))
    sides = {
        "sample_batch_size": sampled,
        "sample_num_batches_per_epoch": batches,
        "train_batch_size": trained,
        "train_gradient_accumulation_steps": 1,
    }
    asked = {
        "model": str(job.model),
        "config": {**trl_config(components), **sides},
        "prompts": ["cat", "dog", "horse", "ant"],
        "device": job.device,
        "threads": 8,
    }
    path = job.folder / f"trl_{sampled}.json"
    path.write_text(json.dumps(asked), encoding="utf-8")
    process = RoundProcess([job.trl_python, str(SCRIPTS / "trl_rounds.py"), str(path)], path.with_suffix(".log"))
    return {"steps": job.steps, **_rounds(job, process, sampled * batches, bare=False)}


def our_section(job: Job, name: str, overrides: list[str]) -> dict[str, Any]:
    """Time two rounds of the program, report the second, and time the bare loop."""
    path = job.folder / f"{name.replace(',', '').replace(' ', '_')}.json"
    path.write_text(json.dumps({"recipe": RECIPE, "overrides": job.recipe(*overrides)}), encoding="utf-8")
    process = RoundProcess([sys.executable, "-m", "benchmarks.our_rounds", str(path)], path.with_suffix(".log"))
    return {"steps": job.steps, **_rounds(job, process, job.images, bare=True)}


def _rounds(job: Job, process: RoundProcess, images: int, bare: bool) -> dict[str, Any]:
    """Ask a process for two rounds, and optionally the bare loop. Kill the process at the deadline."""
    ending = threading.Timer(job.left, process.kill)
    ending.start()
    try:
        ready = process.answer()
        answers = [process.ask() for _ in range(2)]
        alone = process.ask(bare=True) if bare else {}
    finally:
        ending.cancel()
        process.close()
    return {"images": images, "first": answers[0], "round": answers[-1], "bare": alone, "versions": ready["versions"]}


def process_section(job: Job, module: str, *arguments: str) -> None:
    """Run a section that is a separate program and writes its own answers."""
    subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments], check=True, timeout=job.left)


def sections(job: Job) -> dict[str, Callable[[], Any]]:
    """Return all sections by name, the most important first."""
    answers, device = job.folder / "variants.jsonl", ["--device", job.device]
    tiny = ["--tiny"] if job.tiny else []
    ours = {name: lambda name=name, words=words: our_section(job, name, words) for name, words in OURS.items()}
    trl = {name: lambda sizes=sizes: trl_section(job, sizes) for name, sizes in TRL_SIZES.items()}
    deterministic = {name: ours.pop(name) for name in ("ours, eager", "ours, compiled")}
    return {
        "device": lambda: device_section(job),
        **trl,
        **ours,
        "memory": lambda: process_section(
            job, "gpu_memory", "--out", str(job.folder), "--model", str(job.model), *device, *tiny
        ),
        "rewards": lambda: process_section(job, "gpu_rewards", str(job.folder / "rewards.jsonl"), *device, *tiny),
        "waits": lambda: process_section(job, "gpu_waits", RECIPE, str(job.folder / "waits.jsonl"), *job.recipe()),
        "variants": lambda: process_section(job, "gpu_variants", RECIPE, str(answers), *job.recipe()),
        **deterministic,
        "noise": lambda: process_section(job, "gpu_noise", RECIPE, str(job.folder / "noise.jsonl"), *job.recipe()),
    }


def main() -> None:
    """Make the model, measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    started = time.monotonic()
    given.output.mkdir(parents=True, exist_ok=True)
    model = given.output / "model"
    if not model.exists():
        save_random_pipeline(model, "tiny" if given.tiny else "sd15", torch.bfloat16)
    steps, images = (2, 4) if given.tiny else (50, 16)
    ends = started + given.seconds
    job = Job(given.output, model, given.device, given.trl_python, steps, images, given.tiny, ends)
    print(f"model made in {time.monotonic() - started:.0f} s", flush=True)
    for name, section in sections(job).items():
        if given.only and name not in given.only:
            continue
        if time.monotonic() - started > given.seconds:
            print(f"no time is left for {name}", flush=True)
            continue
        try:
            found = section()
        except (
            RuntimeError,
            ValueError,
            OSError,
            subprocess.SubprocessError,
        ) as error:  # the other sections are still useful
            print(f"{name} failed: {error}", flush=True)
            continue
        if found is not None:
            job.write(name, found)
    print(markdown(given.output))


if __name__ == "__main__":
    main()

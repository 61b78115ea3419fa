"""make bench-gpu: measure Stable Diffusion 1.5 with random weights on one GPU, beside TRL and the GPU's own limits.

Needs neither network nor Ray: `python -m benchmarks.gpu`, with whatever torch is there. It takes six minutes at most.
TRL runs in the Python that `--trl-python` names, and is left out if that Python has no TRL.
The decisive sections come first. Each is written to the folder as soon as it ends, and stopped after `--seconds`.
`--only` chooses sections, those of `LONG` too, which a plain call leaves out. `--tiny --device cpu` runs anywhere.
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
from benchmarks.timing import machine, median_seconds
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.matrix_rate import matrix_rate
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.deploy.driver.components import components_of
from tests.parity.sides import trl_config

RECIPE = "deploy/recipes/sd15_compressibility.toml"
SCRIPTS = Path(__file__).parent
IMAGES = 16  # a round, rounded up to whole tasks
# TRL's example has 6 images a sampling batch and 3 a training batch; the others are as large as an 80 GB GPU takes.
TRL_SIZES = {"TRL, its example's batches": (6, 3), "TRL, largest batches": (16, 8)}
LARGE, SHIPPED = (16, 8), (6, 6)  # ours: images a task and transitions a micro-batch; as sd15_aesthetic.toml ships
NOT_DETERMINISTIC = ["--runtime.deterministic", "false"]  # as TRL runs
COMPILED = ["--policy.compile", "both", "--algorithm.off_policy.ratio", "proximal"]
OURS: dict[str, tuple[tuple[int, int], list[str]]] = {
    "ours": (LARGE, []),
    "ours, not deterministic": (LARGE, NOT_DETERMINISTIC),
    "ours, without CUDA graphs": (LARGE, ["--policy.cuda_graphs", "false"]),
    "ours, the shipped recipe's batches": (SHIPPED, []),
    "ours, compiled": (LARGE, COMPILED),
    "ours, compiled, not deterministic": (LARGE, COMPILED + NOT_DETERMINISTIC),
}
# Sections of minutes, which run only if `--only` names them.
NETWORK_SECONDS = 100.0
LONG = ("ours, compiled", "ours, compiled, not deterministic", "blocks compiled", "memory", "rewards", "waits", "noise")


@dataclass(frozen=True)
class Job:
    """The benchmark's model, sizes and output folder."""

    folder: Path
    model: Path
    device: str
    trl_python: str
    steps: int
    tiny: bool
    ends: float  # by the monotonic clock

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return max(1.0, self.ends - time.monotonic())

    def recipe(self, *overrides: str, sizes: tuple[int, int] = LARGE) -> list[str]:
        """Return overrides of `RECIPE`: this model, and one optimizer step on all images of a round."""
        size, micro_batch = (4, 2) if self.tiny else sizes
        images = self.images_of(size)
        values = {
            "policy.model": str(self.model),
            "policy.dtype": "bfloat16",
            "sampling.num_steps": self.steps,
            "sampling.batch_size": size,
            "sampling.batches_per_round": images // size,
            "learner.batch_size": images,
            "learner.gradient_accumulation_steps": 1,
            "learner.micro_batch_size": micro_batch,
            "runtime.device": self.device,
            "runtime.threads": 8 if self.device == "cuda" else 1,
            "evaluation.every": 0,
        }
        return [word for key, value in values.items() for word in (f"--{key}", str(value))] + list(overrides)

    def images_of(self, size: int) -> int:
        """Return the images a round: whole tasks of this size, about 16 images."""
        return size if self.tiny else -(-IMAGES // size) * size

    def write(self, section: str, found: Any) -> None:
        """Append the result of a section to the answers."""
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps({"section": section, "found": found}) + "\n")
        print(f"[{time.strftime('%H:%M:%S')}] {section}: {json.dumps(found)[:600]}", flush=True)


def device_section(job: Job) -> dict[str, Any]:
    """Measure the device's matrix and copy rates, and count the operations of one row of the network."""
    source = torch.randn(2**29 if job.device == "cuda" else 2**22, device=job.device, dtype=torch.bfloat16)
    goal = torch.empty_like(source)
    copied = median_seconds(lambda: goal.copy_(source), 20)
    work = StableDiffusion(model=str(job.model), dtype="bfloat16").sizes(SamplingTable()).work
    assert work is not None, "the network has matrix products"
    rates = {"flops": matrix_rate(job.device, torch.bfloat16), "copied": 2 * source.nbytes / copied}
    return {**rates, "forward_flops": work.forward, "both_flops": work.both, "machine": machine()}


def trl_section(job: Job, sizes: tuple[int, int]) -> dict[str, Any]:
    """Time two rounds of TRL and report the second."""
    sampled, trained = (4, 2) if job.tiny else sizes
    components = components_of(Recipe.load(RECIPE, job.recipe()))
    batches = job.images_of(sampled) // sampled
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


def our_section(job: Job, name: str, sizes: tuple[int, int], overrides: list[str]) -> dict[str, Any]:
    """Time two rounds of the program, report the second, and time the bare loop."""
    words = job.recipe(*overrides, sizes=sizes)
    path = job.folder / f"{name.replace(',', '').replace(' ', '_')}.json"
    path.write_text(json.dumps({"recipe": RECIPE, "overrides": words}), encoding="utf-8")
    process = RoundProcess([sys.executable, "-m", "benchmarks.our_rounds", str(path)], path.with_suffix(".log"))
    images = Recipe.load(RECIPE, words).images_per_round
    return {"steps": job.steps, **_rounds(job, process, images, bare=True)}


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
    """Return all sections by name, the decisive ones first and those that compile last."""
    device = ["--device", job.device, *(["--tiny"] if job.tiny else [])]
    network = str(job.folder / "network.jsonl")
    ours = {name: lambda name=name, each=each: our_section(job, name, *each) for name, each in OURS.items()}
    trl = {name: lambda sizes=sizes: trl_section(job, sizes) for name, sizes in TRL_SIZES.items()}
    compiled = {name: ours.pop(name) for name in LONG if name in ours}
    return {
        "device": lambda: device_section(job),
        "network": lambda: process_section(job, "gpu_network", network, *device, "--seconds", str(NETWORK_SECONDS)),
        "ours": ours.pop("ours"),
        "ours, not deterministic": ours.pop("ours, not deterministic"),
        "TRL, largest batches": trl.pop("TRL, largest batches"),
        **ours,
        **trl,
        "noise": lambda: process_section(job, "gpu_noise", RECIPE, str(job.folder / "noise.jsonl"), *job.recipe()),
        "waits": lambda: process_section(job, "gpu_waits", RECIPE, str(job.folder / "waits.jsonl"), *job.recipe()),
        "rewards": lambda: process_section(job, "gpu_rewards", str(job.folder / "rewards.jsonl"), *device),
        "memory": lambda: process_section(
            job, "gpu_memory", "--out", str(job.folder), "--model", str(job.model), *device
        ),
        "blocks compiled": lambda: process_section(job, "gpu_network", network, *device, "--compile-blocks"),
        **compiled,
    }


def section_names() -> tuple[str, ...]:
    """Return the names of all sections in their order."""
    return tuple(sections(Job(Path(), Path(), "cuda", "", 0, False, 0.0)))


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help with the lines of the description and of the sections as they are, and with defaults."""


def _parser() -> argparse.ArgumentParser:
    """Return the program's options, whose help lists the sections."""
    names = section_names()
    plain, named = ([name for name in names if (name in LONG) is long] for long in (False, True))
    listed = "\n".join(["sections of a plain call, in their order:", *(f"  {name}" for name in plain)])
    listed += "\n".join(["\n\nsections that run only if --only names them:", *(f"  {name}" for name in named)])
    parser = argparse.ArgumentParser(description=__doc__, epilog=listed, formatter_class=_Help)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/gpu"), help="folder of the model and of the results")
    add("--trl-python", default=sys.executable, help="Python that has TRL")
    add("--device", default="cuda", help="cuda or cpu")
    add("--seconds", type=float, default=340.0, help="time after which no section begins")
    add("--steps", type=int, default=20, help="denoising steps")
    only = "sections to run, each name in quotes"
    add("--only", nargs="*", default=[], choices=names, metavar="SECTION", help=only)
    add("--tiny", action="store_true", help="a tiny model and two steps, to try the program")
    return parser


def main() -> None:
    """Make the model, measure, and print the tables."""
    given = _parser().parse_args()
    started = time.monotonic()
    given.output.mkdir(parents=True, exist_ok=True)
    model = given.output / "model"
    if not model.exists():
        save_random_pipeline(model, "tiny" if given.tiny else "sd15", torch.bfloat16)
    steps = 2 if given.tiny else given.steps
    ends = started + given.seconds
    job = Job(given.output, model, given.device, given.trl_python, steps, given.tiny, ends)
    print(f"model made in {time.monotonic() - started:.0f} s", flush=True)
    for name, section in sections(job).items():
        if name not in given.only if given.only else name in LONG:
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

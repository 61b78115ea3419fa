"""Measure which batches fit on a GPU of which size: the learner's largest micro-batch and the sampler's largest task.

    python -m benchmarks.gpu_memory --out FOLDER

A GPU of N GB is this GPU with torch's allocator limited to N GiB minus the memory that CUDA takes beside it. With
`--tiny --device cpu`, a model of a few kilobytes is counted operation by operation, and the limits shrink accordingly.
"""

import argparse
import csv
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_stable_diffusion import save_random_pipeline
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.memory.live_bytes import allocated_peak
from ray_ddpo.common.diffusion.memory.sizes import CONTEXT_BYTES, LEFT_FREE, PolicySizes, parameter_bytes
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.tables import RuntimeTable, SamplingTable
from ray_ddpo.common.runtime import settle
from ray_ddpo.learner.algorithms.ddpo_is import DDPOImportanceSampling
from ray_ddpo.learner.optimization.micro_batch import StepTrial

GIGABYTES = (8, 12, 16, 24, 40, 80)
TINY_GIGABYTES = (0.008, 0.016)
SAMPLING = SamplingTable(num_steps=2)
# Sampler: 31 decoded images of 256 · 512² numbers are the most that 32-bit indices allow. Learner: to limit time.
MOST = {"learner": 40, "learner, checkpointing": 64, "sampler": 31}
BISECTIONS = 3  # after the planned batch


@dataclass(frozen=True)
class Row:
    """One role on a GPU of one size: the largest batch that ran under the limit, and the planned one."""

    gigabytes: float
    role: str
    planned_batch: int  # the largest that the plan lets onto it, a tenth left free
    largest_batch: int  # that ran; 0: not one
    allocated_gb: float  # at the most, by the largest that ran
    reserved_gb: float
    predicted_gb: float
    error_percent: float  # of the prediction
    seconds: float  # all trials


@dataclass(frozen=True)
class Subject:
    """A role's work on the device and its predicted memory."""

    role: str
    peak: Callable[[int], float]  # bytes allocated at the most by a batch; infinite where memory ran out
    predicted: Callable[[int], int]
    largest: Callable[[float], int]  # batch that is predicted to fit into so many bytes


def main() -> None:
    """Measure, print the table as Markdown, and write the rows as CSV."""
    arguments = _arguments()
    device = settle(RuntimeTable(device=arguments.device, threads=arguments.threads))
    sizes = arguments.gigabytes or (TINY_GIGABYTES if arguments.tiny else GIGABYTES)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    start, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or save_random_pipeline(Path(scratch) / "model", "tiny" if arguments.tiny else "sd15")
        print(f"{model}: ready after {time.perf_counter() - start:.0f} s", flush=True)
        for subject in _subjects(str(model), arguments.dtype, device):
            for gigabytes in sizes:
                if time.perf_counter() - start > arguments.seconds:
                    break
                rows.append(_measured(subject, gigabytes, device))
                print(rows[-1], flush=True)
                _write_csv(folder / "gpu_memory.csv", rows)
    table = _markdown(rows)
    (folder / "gpu_memory.md").write_text(table)
    print(table)


def _arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for gpu_memory.csv and gpu_memory.md")
    parser.add_argument("--model", help="a pipeline's folder; none: one of random weights is made")
    parser.add_argument("--tiny", action="store_true", help="a model of a few kilobytes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--gigabytes", type=float, nargs="*")
    parser.add_argument("--seconds", type=float, default=100.0, help="after which no further row is begun")
    return parser.parse_args()


def _subjects(model: str, dtype: str, device: str) -> Iterator[Subject]:
    """Yield each role with a fresh policy. The previous policy is freed first."""
    for role, checkpointing in (("learner", False), ("sampler", False), ("learner, checkpointing", True)):
        config = StableDiffusion.model_validate(
            {"model": model, "dtype": dtype, "gradient_checkpointing": checkpointing}
        )
        sizes = config.sizes(SAMPLING, "cuda" if device == "cuda" else "cpu")
        policy = config.load(device, SAMPLING, "sampler" if role == "sampler" else "learner")
        if role == "sampler":
            yield _sampler(policy, sizes)
        else:
            trial = StepTrial(policy, DDPOImportanceSampling(clip_range=1e-4), sizes)
            yield Subject(role, trial.peak, sizes.learner.of, sizes.learner.largest)
            del trial
        del policy
        _empty(device)


def _sampler(policy: Any, sizes: PolicySizes) -> Subject:
    """Return the sampler's subject: sampling and decoding a task."""

    def task(images: int) -> None:
        trajectory = sample_trajectories(policy, ["a cat"] * images, list(range(images)), SAMPLING)
        policy.decode(trajectory.final_latents)

    held = sum(parameter_bytes(part) for part in (policy.network, policy.vae, *policy.text_encoders))
    return Subject(
        "sampler",
        lambda images: allocated_peak(lambda: task(images), policy.device, held),
        sizes.sampler_bytes,
        sizes.largest_batch,
    )


def _empty(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _measured(subject: Subject, gigabytes: float, device: str) -> Row:
    """Try the planned batch, then bisect a few times between the largest that ran and the smallest that failed."""
    start, limit = time.perf_counter(), _limit(gigabytes, device)
    most = MOST[subject.role]
    planned = subject.largest((1 - LEFT_FREE) * limit)
    ran, allocated, reserved = 0, 0.0, 0.0
    too_much = min(most, math.ceil(1.1 * subject.largest(limit)) + 1) + 1
    candidate = max(1, min(planned, most))
    for _ in range(1 + BISECTIONS):
        peak = subject.peak(candidate)
        if peak <= limit:
            ran, allocated = candidate, peak
            reserved = torch.cuda.max_memory_reserved() if device == "cuda" else peak
        else:
            too_much = candidate
        if too_much - ran <= 1:
            break
        candidate = (ran + too_much) // 2
    predicted = subject.predicted(ran) if ran else 0
    error = 100 * (predicted / allocated - 1) if ran else math.nan
    seconds = time.perf_counter() - start
    gigabyte = (allocated / 1e9, reserved / 1e9, predicted / 1e9)
    return Row(gigabytes, subject.role, planned, ran, *gigabyte, error, seconds)


def _limit(gigabytes: float, device: str) -> float:
    """Limit the allocator and return the limit in bytes. On a CPU the caller enforces the limit."""
    if device == "cpu":
        return gigabytes * 2**30
    free, total = torch.cuda.mem_get_info()
    limit = min(gigabytes * 2**30 - CONTEXT_BYTES, free + torch.cuda.memory_reserved())
    torch.cuda.set_per_process_memory_fraction(limit / total)
    return limit


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(astuple(row) for row in rows)


def _markdown(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| GPU | role | planned batch | largest that ran | allocated | reserved | predicted | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = f"{row.allocated_gb:.3g} GB | {row.reserved_gb:.3g} GB | {row.predicted_gb:.3g} GB"
        batches = f"{row.planned_batch} | {row.largest_batch}"
        lines.append(f"| {row.gigabytes:g} GB | {row.role} | {batches} | {memory} | {row.error_percent:+.1f} % |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

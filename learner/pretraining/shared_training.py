"""Train networks in processes that share each batch, with a moving average, and save the state every few minutes."""

import copy
import math
import os
import time
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ray_ddpo.learner.pretraining.training_state import TrainingProgress, load_training, save_training

LEARNING_RATE = 1e-3
WARM_UP_STEPS = 100
EMA_DECAY = 0.999
STEPS_A_LOSS = 50
SECONDS_A_SNAPSHOT = 180


@dataclass(frozen=True)
class TrainingPlan:
    """The settings of a training, for every process."""

    steps: int
    seed: int
    workers: int
    work: Path  # folder of state, material and autoencoder
    output: Path  # folder of the pipeline


def pretraining_parser(description: str, work: str, steps: int, autoencoder_steps: int, what: str) -> ArgumentParser:
    """Return the command line that both embedded models are trained with.

    Args:
        description: of the program.
        work: the default of `--work`.
        steps: the default of `--steps`.
        autoencoder_steps: the default of `--autoencoder_steps`.
        what: the networks that `--steps` train.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--work", type=Path, default=Path(work), help="folder for the training's state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps, help=f"of {what}; a multiple of {STEPS_A_LOSS}")
    parser.add_argument("--autoencoder_steps", type=int, default=autoencoder_steps)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each; they divide the batch")
    parser.add_argument("--resume", action="store_true", help="resume from the state in --work")
    return parser


def parsed(parser: ArgumentParser) -> Namespace:
    """Parse the command line, and make the folder of the state. A folder in use is refused unless it is resumed."""
    options = parser.parse_args()
    if not options.resume and options.work.exists() and any(options.work.iterdir()):
        parser.error(f"--work {options.work} is not empty: give --resume to resume from it, or another folder")
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.workers)
    return options


class SharedTraining(ABC):
    """Networks in training, and their moving average, which is saved. Every process has the same."""

    name: ClassVar[str]  # in the progress lines

    def __init__(self, plan: TrainingPlan, live: nn.Module):
        self.plan, self.live, self.progress = plan, live, TrainingProgress()
        self.averaged = copy.deepcopy(self.live).requires_grad_(False)
        self.shared = DistributedDataParallel(self.live)
        self.optimizer = torch.optim.AdamW(self.live.parameters(), LEARNING_RATE, fused=True)
        self.modules = {"live": self.live, "averaged": self.averaged}

    @abstractmethod
    def loss(self, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the loss of this process's share of a random batch. `generator` is the same in every process."""

    @abstractmethod
    def save_pipeline(self) -> None:
        """Save a pipeline with the averaged networks in the plan's output folder."""

    def learning_rate(self) -> float:
        """Return the learning rate: linear warm-up, then cosine decay to zero."""
        step, steps = self.progress.step, self.plan.steps
        return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2

    def share(self) -> slice:
        """Return the rows of a batch that this process trains on."""
        return slice(distributed.get_rank(), None, self.plan.workers)

    def update(self) -> float:
        """Make an optimizer step, and return its loss."""
        # A generator for each step, so that a resumed training has the same random numbers as an uninterrupted one.
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.progress.step)
        loss = self.loss(generator)
        loss.backward()
        self._step()
        return loss.item()

    def _step(self) -> None:
        """Apply the gradients, and update the moving average."""
        nn.utils.clip_grad_norm_(self.live.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # A small decay at first, so that the random initial weights are soon forgotten.
        decay = min(EMA_DECAY, (1 + self.progress.step) / (10 + self.progress.step))
        live = [parameter.detach() for parameter in self.live.parameters()]
        torch._foreach_lerp_(list(self.averaged.parameters()), live, 1 - decay)
        self.progress.step += 1

    def run(self) -> None:
        """Train until the last step, from the saved state if there is one. Rank 0 shows progress and saves."""
        plan, rank = self.plan, distributed.get_rank()
        if (plan.work / "training.safetensors").exists():
            self.progress = load_training(plan.work, self.modules, self.optimizer)
        distributed.barrier()
        started, saved = time.monotonic() - self.progress.seconds, time.monotonic()
        recent: list[float] = []
        with Progress(disable=rank > 0) as bar:
            task = bar.add_task(self.name, total=plan.steps, completed=self.progress.step)
            while self.progress.step < plan.steps:
                recent.append(self.update())
                bar.advance(task)
                if self.progress.step % STEPS_A_LOSS == 0 and rank == 0:
                    self._note(recent, started, bar)
                    if time.monotonic() - saved > SECONDS_A_SNAPSHOT or self.progress.step >= plan.steps:
                        save_training(plan.work, self.modules, self.optimizer, self.progress)
                        self.save_pipeline()
                        saved = time.monotonic()

    def _note(self, recent: list[float], started: float, bar: Progress) -> None:
        self.progress.seconds = time.monotonic() - started
        self.progress.losses.append(sum(recent) / len(recent))
        recent.clear()
        step, minutes = self.progress.step, self.progress.seconds / 60
        bar.console.print(f"{self.name} step {step}: loss {self.progress.losses[-1]:.4f}, {minutes:.1f} minutes")


def join_process_group(rank: int, workers: int) -> None:
    """Join the processes that share a training, with one thread."""
    # One thread a process: with several, every small operation waits for the slowest thread.
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29541")}
    distributed.init_process_group("gloo", rank=rank, world_size=workers)

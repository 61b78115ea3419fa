"""A model family and a reward that print, and that fail or die once or always, as a user's might."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_ddpo.actors.rewards.jpeg import jpeg_kilobytes
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.policy import Role
from ray_ddpo.common.recipe.tables import SamplingTable


class OwnPolicy(StableDiffusion):
    """A policy that prints which role loads it and fails as configured.

    Args:
    fails: The failure of a role at loading, unless a file of the role's name exists in `once`.
    poisons: The number of the learner's gradient that gets a NaN, unless the file `poisoned` exists in `once`.
    """

    fails: dict[str, str] = {}
    once: str | None = None
    poisons: int | None = None

    def load(self, device: str, sampling: SamplingTable, role: Role) -> Any:
        print(f"process {os.getpid()} loads the {role}'s policy and sees GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        logging.warning("process %d warns", os.getpid())
        if role in self.fails and (self.once is None or _first(Path(self.once) / role)):
            _fail(self.fails[role])
        policy = super().load(device, sampling, role)
        if role == "learner" and self.poisons and self.once:
            _poison(policy.network, self.poisons, Path(self.once) / "poisoned")
        return policy


def _poison(network: torch.nn.Module, which: int, marker: Path) -> None:
    """Put a NaN into the first parameter's `which`-th gradient, in the first process that computes it."""
    calls: list[int] = []

    def poisoned(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) != which or not _first(marker):
            return gradient
        changed = gradient.clone()
        changed.view(-1)[0] = torch.nan
        return changed

    next(iter(trained_parameters(network).values())).register_hook(poisoned)


def _first(marker: Path) -> bool:
    """Create the file and return True if it does not exist yet. Of several processes one is the first."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _fail(how: str) -> None:
    match how:
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation.")
        case "exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def aborts_once(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Score JPEG sizes; abort the process the first time. A prompt is the path of the file that remembers it."""
    print(f"process {os.getpid()} scores")
    if any(prompt.startswith("/") and _first(Path(prompt)) for prompt in prompts):
        print("last words")
        os.abort()
    return jpeg_kilobytes(images)

"""Timing in turn, and what figures belong to: the machine, the day, the commit."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes, and what it has left to a GPU."""
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the GPU has done all that it was given; at once where there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """The median of so many, after one that does not count."""
    work()
    wait()
    return median(seconds(work) for _ in range(repeats))


def machine() -> str:
    """What the figures belong to."""
    commit = ""
    if shutil.which("git"):  # a benchmark machine may have a copy of the files alone
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    cores = f"{os.cpu_count()} cores {platform.machine()}"
    return f"{time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}, {gpu}{cores}, torch {torch.__version__}"

"""Interleaved timing, and the machine, date and commit that measurements belong to."""

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
    """Return the duration of `work`, including the work that it queued on a GPU."""
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Wait until the GPU has finished its work. Return at once if there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median duration of `repeats` calls, after a warm-up call."""
    work()
    wait()
    return median(seconds(work) for _ in range(repeats))


def machine() -> str:
    """Return date, commit, hardware and torch version of the measurements."""
    commit = ""
    if shutil.which("git"):  # a benchmark machine may have a copy of the files alone
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    cores = f"{os.cpu_count()} cores {platform.machine()}"
    return f"{time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}, {gpu}{cores}, torch {torch.__version__}"

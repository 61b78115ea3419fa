"""make whole-network: measure memory and time of reading, averaging, loading and saving all weights of a network."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.timing import machine
from ray_ddpo.common.diffusion.lora.adapters import load_weights, read_weights
from ray_ddpo.common.policy_weights import averaged
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.checkpoints.shards import SHARD_BYTES

MILLIONS = 400
LAYER = 10_000_000  # numbers of a parameter; Stable Diffusion 1.5's largest has 29 million
STEPS = ("read", "average", "load", "save", "find and read again")


def network_of(millions: int) -> nn.Module:
    """Return a network of this many million random parameters."""
    layers = millions * 1_000_000 // LAYER
    return nn.ParameterList([nn.Parameter(torch.randn(LAYER)) for _ in range(layers)])


def work_of(step: str, network: nn.Module, folder: Storage, shard_bytes: int) -> Callable[[], Any]:
    """Prepare a step and return the function to measure."""
    if step == "read":
        return lambda: read_weights(network, 1)
    weights = read_weights(network, 1)
    if step == "average":
        other = read_weights(network, 2)
        return lambda: averaged(weights, other, 0.9)
    if step == "load":
        return lambda: load_weights(network, weights)
    optimizer_state = {
        f"{name}/{key}": np.array(array) for name, array in weights.arrays().items() for key in ("m", "v")
    }
    state = Checkpoint(1, LearnerState(1, (weights,), optimizer_state, {}), {})
    if step == "save":
        return lambda: save_checkpoint(folder, state, 1, shard_bytes)
    save_checkpoint(folder, state, 1, shard_bytes)
    del state, optimizer_state, weights
    return lambda: load_checkpoint(_there(folder))


def _there(folder: Storage) -> Storage:
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def measure(step: str, millions: int, shard_bytes: int) -> None:
    """Run one step. Print its memory beyond the start relative to the bytes of the weights, and its seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        network = network_of(millions)
        work = work_of(step, network, Storage(scratch), shard_bytes)
        with open("/proc/self/clear_refs", "w") as refs:  # the peak counts from here
            refs.write("5")
        before, start = _resident(), time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        del result
        print((_peak() - before) / (4e6 * millions), seconds)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=MILLIONS)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--step", choices=STEPS)
    options = parser.parse_args()
    if options.step:
        measure(options.step, options.millions, options.shard_bytes)
        return
    print(f"{machine()}; {options.millions} million parameters, {4e-3 * options.millions:.1f} GB\n")
    print("| step | most memory beside what was there, over the weights | seconds |\n|---|---|---|")
    for step in STEPS:
        numbers = ["--millions", str(options.millions), "--shard-bytes", str(options.shard_bytes), "--step", step]
        command = [sys.executable, "-m", "benchmarks.whole_network", *numbers]
        memory, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(f"| {step} | {float(memory):.2f} | {float(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()

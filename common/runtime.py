"""Process-wide state, equal in every role and without Ray: device, threads, determinism, random states."""

import os
import random
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_ddpo.common.recipe.tables import RuntimeTable


def settle(runtime: RuntimeTable) -> str:
    """Apply the recipe's `[runtime]` to this process. Return the device to compute on.

    Threads are set here, because Ray would set them from num_cpus, and they decide the last bits of a sum.

    Raises:
        ValueError: The recipe asks for a GPU that this process does not see.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "runtime.device is 'cuda' and this process sees no GPU: give its role num_gpus, or device 'cpu'"
        )
    torch.set_num_threads(runtime.threads)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(runtime.deterministic)
    # Filling new tensors costs time and only helps to find reads of uninitialized memory; bits do not depend on it.
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    # torch's defaults differ: float32 convolutions run in TF32 (10 bits of mantissa), matrix products in float32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = runtime.tf32
    pin_attention()
    return "cuda" if runtime.device != "cpu" and torch.cuda.is_available() else "cpu"


def pin_attention() -> None:
    """Choose the kernels of attention on a GPU: flash for half precision, the memory-efficient one for float32.

    Without determinism torch prefers cuDNN's kernels on Hopper and newer GPUs, and with it they are refused. Leaving
    them out in both cases keeps the forward kernels, and so the log-probs, independent of `runtime.deterministic`.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    for enable in (
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_math_sdp,  # for shapes that neither fused kernel takes
    ):
        enable(True)


def to_device(tensor: Tensor, device: str) -> Tensor:
    """Copy a tensor without blocking the host. A copy from pageable memory would wait for the GPU's queue."""
    if tensor.device.type != "cpu" or device.startswith("cpu"):
        return tensor.to(device)
    # Expanded tensors cannot be pinned, so make them contiguous first.
    pinned = tensor.contiguous().pin_memory() if device.startswith("cuda") else tensor
    return pinned.to(device, non_blocking=True)


def python_stacks() -> str:
    """Return the stack of every thread of this process, for the watchdog's dump."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in frames
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch, on the CPU and on this process's GPU."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Restore torch's global settings: gradients on or off, default dtype, threads and determinism.

    With `--serial` the learner runs in the same process and must not see a reward's changes.
    """
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)

"""Compile a network in one process of a machine while the others wait, and then take the code from torch's cache."""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ray_ddpo.common.model_files.model_hub import first_line
from ray_ddpo.common.print_line import print_line


def compile_in_turn(role: str, key: str, compile_now: Callable[[], object], folder: Path | None = None) -> None:
    """Compile by a first call, and print what is going on.

    The first process of a machine compiles alone. When it has ended, all others compile at once, from the cache that
    torch keeps in the machine's files. If the first process dies, the next one takes its place.

    Args:
        role: the role in words.
        key: everything that decides the compiled code. Processes with equal keys take turns.
        compile_now: the call that compiles. Its result is dropped.
        folder: torch's cache, by default that of TORCHINDUCTOR_CACHE_DIR.

    Raises:
        ValueError: torch cannot compile the network.
    """
    from torch._dynamo.exc import TorchDynamoException

    whole = "\n".join([key, torch.__version__, _device_name()])
    cache = folder or _cache_folder()
    base = cache / f"ray_ddpo-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"
    with _turn(role, base) as is_first:
        others = "first on this machine; the others take its cache" if is_first else "from this machine's cache"
        print_line(f"compiling the {role}'s network ({others}) …", to_stdout=True)
        start = time.perf_counter()
        try:
            compile_now()
        except TorchDynamoException as error:
            less = '"sampler" or "none"' if role == "learner" else '"none"'
            raise ValueError(
                f"policy.compile: torch cannot compile the {role}'s network: {first_line(error)}; give policy.compile = "
                f"{less}, or policy.compile_blocks = true"
            ) from error
        print_line(f"compiled the {role}'s network in {time.perf_counter() - start:.0f} s", to_stdout=True)


@contextmanager
def _turn(role: str, base: Path) -> Iterator[bool]:
    """Wait while another process compiles. Yield whether this process is the first; the others then wait for it."""
    done = base.with_suffix(".done")
    if done.exists():
        yield False
        return
    with base.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_line(f"waiting for another process that compiles the {role}'s network", to_stdout=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            yield True
            done.touch()
            return
    yield False  # the lock is free again: the others need not wait for each other


def _cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _device_name() -> str:
    """Return the GPU's name, because compiled code is made for one kind of GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else os.uname().machine

"""Measure the rate of a device's matrix products, which a run's arithmetic is compared with (MFU)."""

import functools
import time
from collections.abc import Callable

import torch

# Sides of square matrices, until a product takes long enough.
SIDES = (512, 1024, 2048, 4096, 8192)
LONG_ENOUGH = 0.003  # seconds: then starting the product no longer counts
REPEATED = 5  # products of each size, of which the fastest counts


@functools.cache
def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Return the operations a second of large matrix products in `dtype`: of the GPU, or of all threads of this process.

    On a CPU one thread is measured. Several would wait for each other while processes that start keep the cores busy,
    and the rate would be several times too low.

    Call this after `settle`, which decides about TF32, threads and cuBLAS's workspace. No random state is used.
    """
    is_cuda = device.startswith("cuda")

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize()

    def product(side: int) -> Callable[[], object]:
        # Not all alike: some GPUs multiply constants faster than numbers.
        matrix = torch.arange(side * side, device=device, dtype=torch.float32).sin().view(side, side).to(dtype)
        return lambda: matrix @ matrix

    threads = torch.get_num_threads()
    with torch.no_grad():
        if not is_cuda:
            torch.set_num_threads(1)
        rate = fastest_rate(product, wait, time.perf_counter)
        torch.set_num_threads(threads)
    if is_cuda:
        torch.cuda.empty_cache()  # so that the memory that is free afterwards is what it was
        return rate
    return threads * rate


def fastest_rate(
    product: Callable[[int], Callable[[], object]], wait: Callable[[], None], clock: Callable[[], float]
) -> float:
    """Return the highest rate of the products up to the first size that takes long enough, in operations a second.

    Args:
        product: returns a function that multiplies two square matrices of this side.
        wait: blocks until the device has finished.
        clock: the time in seconds.
    """
    rate = 0.0
    for side in SIDES:
        multiply = product(side)
        multiply()  # loads the kernel
        wait()
        seconds = min(_timed(multiply, wait, clock) for _ in range(REPEATED))
        rate = max(rate, 2 * side**3 / seconds if seconds > 0 else 0.0)
        if seconds >= LONG_ENOUGH:
            break
    return rate


def _timed(multiply: Callable[[], object], wait: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    multiply()
    wait()
    return clock() - start

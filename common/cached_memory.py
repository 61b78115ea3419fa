"""Return the GPU memory that torch keeps for later tensors, so that another process can use it meanwhile."""

import gc
from collections.abc import Callable

import torch


def return_cached_memory(
    uses_gpu: Callable[[], bool] = torch.cuda.is_initialized,
    collect: Callable[[], object] = gc.collect,
    empty_cache: Callable[[], object] = torch.cuda.empty_cache,
) -> None:
    """Return the memory of finished work to the GPU. Weights and all other live tensors stay where they are.

    The allocator keeps memory of freed tensors, which no other process can use. Afterwards it asks the GPU again for
    what it needs, which costs milliseconds. The workspaces of cuBLAS stay, because captured CUDA graphs may use them.
    A process that has not used a GPU has nothing to return.

    Args:
        uses_gpu: returns whether this process has used a GPU.
        collect: frees tensors in reference cycles.
        empty_cache: returns the allocator's free memory.
    """
    if uses_gpu():
        collect()
        empty_cache()

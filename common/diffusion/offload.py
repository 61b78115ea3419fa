"""Keep idle parts of a pipeline in the host's memory, and copy them to the device only while they work."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def pinned(tensor: Tensor, device: str) -> Tensor:
    """Return a host tensor that a GPU can read directly: pinned, unless the device is no GPU."""
    needs_pinning = device.startswith("cuda") and tensor.device.type == "cpu" and not tensor.is_pinned()
    return tensor.pin_memory() if needs_pinning else tensor


def copied(tensor: Tensor, device: str) -> Tensor:
    """Return a copy on the device, without waiting for it."""
    return tensor.to(device, non_blocking=True)


@contextmanager
def on_device(
    parts: Iterable[nn.Module], device: str, copy: Callable[[Tensor, str], Tensor] = copied
) -> Iterator[None]:
    """Copy modules to the device for the duration of the body, and then drop the copies.

    The host's tensors are kept meanwhile, because weights do not change: nothing is copied back. They are pinned at
    their first use.
    """
    tensors = [each for part in parts for each in (*part.parameters(), *part.buffers())]
    for tensor in tensors:
        tensor.data = pinned(tensor.data, device)  # one after the other, so that the host holds no second model
    on_host = [tensor.data for tensor in tensors]
    try:
        for tensor, host in zip(tensors, on_host, strict=True):
            tensor.data = copy(host, device)
        yield
    finally:
        for tensor, host in zip(tensors, on_host, strict=True):
            tensor.data = host

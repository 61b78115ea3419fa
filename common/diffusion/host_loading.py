"""Load a network for a learner that shards it: its weights stay in their files, or in the host's memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn

from ray_ddpo.common.diffusion.unread_weights import UnreadWeights


@dataclass
class HostLoading:
    """A load for a learner that shards its network."""

    may_leave: bool = True  # weights in their files
    unread: UnreadWeights | None = None  # the weights that loading has left in their files; None: it has read all

    def placed(self, network: nn.Module, device: str) -> bool:
        """Return whether the network that was loaded can compute on `device` as it is."""
        return self.unread is None and next(network.parameters()).device.type == torch.device(device).type


_current: ContextVar[HostLoading | None] = ContextVar("host_loading", default=None)


@contextmanager
def network_on_host(enabled: bool = True) -> Iterator[HostLoading]:
    """Let policies that are loaded in the body keep their network off the device, in contiguous format.

    A network of diffusers is made without its weights if its files have them under the network's own names. A family
    of a user's own may load its network onto the device all the same. It must then fit there whole.
    """
    loading = HostLoading()
    token = _current.set(loading if enabled else None)
    try:
        yield loading
    finally:
        _current.reset(token)


def loads_on_host() -> bool:
    """Return whether a policy that is being loaded must keep its network in the host's memory."""
    return _current.get() is not None


def may_leave_unread() -> bool:
    """Return whether the network that is being loaded may have its weights still in files."""
    loading = _current.get()
    return loading is not None and loading.may_leave


def read_all_weights() -> None:
    """Leave no weights in their files, because a user's own family may compute with them while it loads."""
    loading = _current.get()
    if loading is not None:
        loading.may_leave = False


def leave_unread(unread: UnreadWeights) -> None:
    """Note that the network which is being loaded has its weights still in files."""
    loading = _current.get()
    assert loading is not None, "only a learner that shards its network reads weights later"
    loading.unread = unread


def has_unread() -> bool:
    """Return whether the network that is being loaded has its weights still in files."""
    loading = _current.get()
    return loading is not None and loading.unread is not None

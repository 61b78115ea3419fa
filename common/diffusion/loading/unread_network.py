"""Make a network of diffusers without its weights, which the ranks of a learner read shard by shard."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_ddpo.common.diffusion.host_loading import leave_unread
from ray_ddpo.common.diffusion.unread_weights import UnreadWeights, replace_parameter, without_memory

Shape = tuple[int, ...]


def unread_network(network_class: Any, folder: Path, files: Sequence[str], dtype: torch.dtype) -> Any | None:
    """Return the network that `from_pretrained` makes, with NaN without memory for each parameter.

    `leave_unread` gets the place of the parameters. Buffers are read.

    Returns:
        None if diffusers converts weights or names while it loads these files. They must then be loaded whole.
    """
    from accelerate import init_empty_weights

    random_state = torch.get_rng_state()
    stored = _stored_shapes([folder / name for name in files if name.endswith(".safetensors")])
    with _default_dtype(dtype), init_empty_weights(include_buffers=False):
        network: Any = network_class.from_config(network_class.load_config(str(folder)))
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    tied = len(parameters) != len(list(network.named_parameters(remove_duplicate=False)))
    if tied or network._keep_in_fp32_modules or wanted != {name: shape for name, (_, shape) in stored.items()}:
        torch.set_rng_state(random_state)  # the network is made again, and its adapters must begin as without this one
        return None
    network.register_to_config(_name_or_path=str(folder))
    places = UnreadWeights({name: file for name, (file, _) in stored.items()}, dtype)
    for name, value in places.read({name: slice(None) for name in wanted.keys() - parameters.keys()}):
        module, _, leaf = name.rpartition(".")
        network.get_submodule(module)._buffers[leaf] = value
    for name, parameter in parameters.items():
        replace_parameter(network, name, nn.Parameter(without_memory(parameter.shape, dtype)))
    leave_unread(UnreadWeights({name: places.files[name] for name in parameters}, dtype))
    return network.eval()


def _stored_shapes(files: Sequence[Path]) -> dict[str, tuple[Path, Shape]]:
    """Return file and shape of each tensor in safetensors files, from their headers."""
    from safetensors import safe_open

    found: dict[str, tuple[Path, Shape]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {name: (file, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()}  # noqa: SIM118
    return found


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let floating-point buffers that a network computes itself have the dtype of its weights, as diffusers does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

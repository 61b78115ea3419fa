"""Count the places where the host would wait for a GPU, without a GPU: tensors on the meta device stand for the GPU's."""

import traceback
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernel_counts import tensors_in
from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy

ROOT = Path(__file__).parents[1]
# Operations whose result has a shape that the host must read from the device, or is read itself.
SHAPE_FROM_VALUES = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}


class HostWaits(TorchDispatchMode):
    """A mode that notes each wait for the meta device as `file:line`, and goes on with zeros as the result.

    These wait: reading a number, copying to the CPU, copying from the CPU unless `non_blocking`, and operations whose
    shapes depend on values, such as an index with a mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense" and args[0].is_meta:
            return self._noted(torch.zeros((), dtype=args[0].dtype).item())
        if name in SHAPE_FROM_VALUES and args[0].is_meta:
            return self._noted(func(*(torch.zeros(each.shape, dtype=each.dtype) for each in args)))
        if name == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return self._noted(torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype))
        if name == "copy_" and args[1].is_meta and not args[0].is_meta:
            return self._noted(args[0])
        if name == "index" and any(each.is_meta and each.dtype == torch.bool for each in tensors_in(args[1])):
            return self._noted(args[0])
        if _copied_from_cpu(name, args, kwargs):
            self._noted(None)
        return func(*args, **kwargs)

    def _noted(self, result: Any) -> Any:
        """Note the innermost place in this repository that is not in this file, and return `result`."""
        frames = [
            frame
            for frame in traceback.extract_stack()
            if frame.filename.startswith(str(ROOT)) and ".venv" not in frame.filename and frame.filename != __file__
        ]
        place = frames[-1] if frames else traceback.extract_stack()[0]
        self.places[f"{Path(place.filename).name}:{place.lineno}"] += 1
        return result


def _copied_from_cpu(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation copies from the CPU to the device and blocks the host."""
    if name == "_to_copy":
        to_device = torch.device(kwargs.get("device") or args[0].device).type == "meta"
        return to_device and not args[0].is_meta and not kwargs.get("non_blocking")
    if name != "copy_" or not args[0].is_meta or args[1].is_meta:
        return False
    return not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))


def move_to_meta(policy: Any) -> None:
    """Move a loaded policy to the meta device, where it computes nothing and behaves as on a GPU."""
    assert isinstance(policy, DiffusersPolicy)
    for part in (policy.network, policy.vae, *policy.text_encoders):
        if part is not None:
            part.to("meta")
    policy.device = "meta"
    steps: Any = policy.steps
    assert is_dataclass(steps)
    values = {each.name: getattr(steps, each.name) for each in fields(steps)}
    policy.steps = replace(steps, **{name: _moved(value) for name, value in values.items()})
    policy._embeddings = {prompt: _all_moved(rows) for prompt, rows in policy._embeddings.items()}


def _moved(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _all_moved(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _moved(value) for name, value in rows.items()}

"""Operations whose shapes are remembered give the layouts that torch gives, and counted sizes stay equal."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.loading import model_sizes
from ray_ddpo.common.diffusion.memory.repeated_operations import RepeatedOperations
from tests.tiny_policy import SAMPLING

OPERATIONS: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {
    "a broadcast": lambda x: x + torch.ones(3, 1, 1, device="meta"),
    "a number and its type": lambda x: torch.cat([(x.long() + 1).float(), (x.long() + 1.0)]),
    "a transposed tensor": lambda x: x.transpose(1, 2) * 2,
    "channels_last": lambda x: F.conv2d(x.to(memory_format=torch.channels_last), torch.ones(5, 3, 1, 1, device="meta")),
    "several outputs": lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5),
    "a view": lambda x: x[:, 1:].flatten(1),
    "in place": lambda x: x.clone().uniform_().add_(1),
    "another device": lambda x: torch.zeros(2, device="cpu"),
}


def layouts(output: Tensor | tuple[Tensor, ...]) -> list[tuple]:
    tensors = (output,) if isinstance(output, Tensor) else output
    return [
        (each.shape, each.stride(), each.dtype, each.device, each.untyped_storage().nbytes(), each.storage_offset())
        for each in tensors
    ]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_its_layout_the_second_time_too(name: str) -> None:
    operation, images = OPERATIONS[name], torch.empty(2, 3, 5, 4, device="meta")
    expected = layouts(operation(images))
    with RepeatedOperations():
        outputs = [operation(images), operation(images)]
    assert [layouts(each) for each in outputs] == [expected, expected]
    first, second = (each if isinstance(each, Tensor) else each[0] for each in outputs)
    is_view = name == "a view"
    assert (first.untyped_storage()._cdata == second.untyped_storage()._cdata) == is_view, "new memory, but for views"


def test_the_default_dtype_is_not_remembered() -> None:
    with RepeatedOperations():
        assert torch.zeros(2, device="meta").dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.zeros(2, device="meta").dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.rotated(every=2, group="longest")
def test_counted_sizes_are_equal_without_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StableDiffusion(model=str(tiny_model), gradient_checkpointing=True)
    found = config.sizes(SAMPLING)
    monkeypatch.setattr(model_sizes, "_counted", {})
    monkeypatch.setattr(model_sizes, "RepeatedOperations", nullcontext)
    assert config.sizes(SAMPLING) == found

"""Outputs and gradients of networks whose forward pass is replaced, compared with those of diffusers' own pass."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

Passed = tuple[Tensor, dict[str, Tensor]]


def passed(network: Any, output: Tensor) -> Passed:
    """Return a pass's output, and the gradients of the network's weights."""
    output.square().sum().backward()
    return output.detach(), {name: value.grad for name, value in network.named_parameters()}


def assert_alike(found: Passed, expected: Passed, but: Collection[str] = ()) -> None:
    """Compare outputs and gradients, `but` for weights whose gradients are rounding only, by the ends of their names."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, gradient in expected[1].items():
        if not name.endswith(tuple(but)):
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


def assert_same_bits(found: Passed, expected: Passed) -> None:
    """Compare the bits of outputs and gradients."""
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())

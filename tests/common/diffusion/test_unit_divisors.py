"""Divisions by 1 are skipped: the same bits and gradients, fewer operations, and none of it once compiled."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.kernel_counts import KernelCounts
from ray_ddpo.common.diffusion.unit_divisors import UnitDivisor, compute_unit_divisions, skip_unit_divisions
from tests.tiny_policy import tiny_policy


def test_only_a_division_of_a_tensor_by_it_is_skipped() -> None:
    one, tensor = UnitDivisor(1.0), torch.tensor([0.1, -3.0, torch.inf])
    assert tensor / one is tensor and torch.div(tensor, one) is tensor
    assert torch.equal(one / tensor, 1.0 / tensor)
    assert torch.equal(tensor * one + one, tensor + 1.0)
    assert torch.equal(torch.div(tensor[:2], one, rounding_mode="floor"), tensor[:2].floor())
    assert one == 1.0 and one / 4 == 0.25 and type(copy.deepcopy(one)) is UnitDivisor


def passed(network: Any) -> tuple[Tensor, list[Tensor], int]:
    """Return output, gradients and the number of elementwise operations."""
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
    with KernelCounts() as counts:
        output = network(latents, torch.tensor([900, 10]), text).sample
        output.square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return output.detach(), gradients, counts.kernels["elementwise"]


def test_a_network_keeps_its_bits_and_gradients_with_fewer_operations(tiny_model: Path) -> None:
    plain = UNet2DConditionModel.from_pretrained(tiny_model / "unet").eval()
    skipping, restored = copy.deepcopy(plain), copy.deepcopy(plain)
    for each in (skipping, restored):
        skip_unit_divisions(each)
    compute_unit_divisions(restored)
    (output, gradients, count), (same, also, fewer), (_, _, as_before) = map(passed, (plain, skipping, restored))
    assert torch.equal(output, same) and len(gradients) == len(also) > 0
    assert all(torch.equal(*pair) for pair in zip(gradients, also, strict=True))
    divided = [module for module in plain.modules() if hasattr(module, "output_scale_factor")]
    assert len(divided) > 4 and fewer <= count - 2 * len(divided) and as_before == count


def test_another_factor_stays(tiny_model: Path) -> None:
    network = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    network.mid_block.resnets[0].output_scale_factor = 1.5
    skip_unit_divisions(network)
    assert network.mid_block.resnets[0].output_scale_factor == 1.5


def test_a_compiled_policy_divides_as_written(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    factors = [module for module in policy.network.modules() if hasattr(module, "output_scale_factor")]
    assert {type(module.output_scale_factor) for module in factors} == {UnitDivisor}
    policy.compile(4)
    assert {type(module.output_scale_factor) for module in factors} == {float}

"""Kernels, bytes and host waits: the counters by hand, and the limits that a step of SD 1.5 must stay within."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.host_waits import HostWaits
from benchmarks.kernel_counts import counted
from benchmarks.step_counts import (
    PARTS,
    backward_counts,
    forward_counts,
    in_learner,
    in_sampler,
    meta_network,
    waits_of,
    with_peft,
)
from ray_ddpo.common.diffusion.schedulers.ddim import DDIMTable
from ray_ddpo.common.recipe.recipe import Recipe


@torch.no_grad()
def test_kernels_and_bytes_of_a_small_network_by_hand() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(2))
        linear, inputs = nn.Linear(256, 5).bfloat16(), torch.empty(2, 4, 16, 16)
    counts = counted(lambda: linear(network(inputs).bfloat16()).add_(1.0))
    given, weight, wide = 4 * 2 * 4 * 256, 4 * 8 * 4 * 9, 4 * 2 * 8 * 256
    assert counts.kernels == {"conv": 1, "norm": 1, "elementwise": 2, "casts": 1, "mm": 1}
    assert counts.bytes == {
        "conv": given + weight + 4 * 8 + wide,
        "norm": 2 * wide + 2 * 4 * 8 + 2 * 4 * 4,  # weight and bias; mean and 1/σ of two groups an image
        "elementwise": 2 * wide + 2 * 2 * (2 * 8 * 5),  # SiLU, and the addition in place
        "casts": wide + wide // 2,
        "mm": wide // 2 + 2 * (256 * 5 + 5) + 2 * (2 * 8 * 5),
    }
    assert (counts.transposes, counts.transposed_bytes) == (3, 2 * (given + weight + wide))
    assert (counts.total_kernels, counts.total_bytes) == (6, sum(counts.bytes.values()))


def test_attention_is_one_kernel_forward_and_one_backward_by_hand() -> None:
    query, key = (torch.empty(2, 3, tokens, 8, device="meta", requires_grad=True) for tokens in (16, 4))
    value = key.detach().clone().requires_grad_()

    def work() -> None:
        nn.functional.scaled_dot_product_attention(query, key, value).backward(torch.empty_like(query))

    long, short, sums = 4 * 2 * 3 * 16 * 8, 4 * 2 * 3 * 4 * 8, 4 * 2 * 3 * 16
    counts = counted(work)
    assert counts.kernels["attention"] == 2
    forward, backward = 2 * long + 2 * short + sums, 4 * long + 4 * short + sums
    assert counts.bytes["attention"] == forward + backward


def test_views_allocations_and_expanded_tensors_by_hand() -> None:
    rows = torch.empty(1, 100, device="meta")

    def work() -> None:
        torch.empty_like(rows).view(10, 10).t()
        rows.expand(50, 100).clone()
        torch.zeros(7, device="meta")

    counts = counted(work)
    assert counts.kernels == {"layout copies": 1, "other": 1}
    assert counts.bytes == {"layout copies": 400 + 50 * 400, "other": 4 * 7}


@pytest.fixture(scope="module")
def bare() -> Any:
    return meta_network()


@pytest.fixture(scope="module")
def forward(bare: Any) -> dict[str, Any]:
    makers = {"bare": lambda network: network, "peft": with_peft, "sampler": in_sampler}
    return {name: forward_counts(make(copy.deepcopy(bare))) for name, make in makers.items()}


@pytest.mark.rotated(every=2, group="longest")
def test_a_forward_pass_of_32_rows_stays_within_1000_kernels_and_100_gb(forward: dict[str, Any]) -> None:
    assert forward["sampler"].total_kernels <= 1000
    assert forward["sampler"].total_bytes <= 100e9


def test_adapters_of_a_sampler_cost_two_matrix_products_a_layer_and_no_cast(forward: dict[str, Any]) -> None:
    sampler, bare = (forward[name].kernels for name in ("sampler", "bare"))
    assert sampler["mm"] - bare["mm"] == 2 * 128  # 16 blocks with two attentions of four projections each
    assert bare["elementwise"] - sampler["elementwise"] == 22 + 32  # divisions by 1, of residual blocks and attentions
    assert all(sampler[kind] == bare[kind] for kind in ("conv", "attention", "norm", "layout copies", "casts", "other"))
    # PEFT also multiplies by alpha / rank, adds, and casts input and output.
    by_peft = forward["peft"].kernels - forward["bare"].kernels
    assert by_peft == {"mm": 2 * 128, "elementwise": 2 * 128, "casts": 2 * 128}


def test_a_micro_batch_launches_fewer_kernels_and_moves_fewer_bytes_than_by_peft(bare: Any) -> None:
    ours, by_peft = (backward_counts(make(copy.deepcopy(bare))) for make in (in_learner, with_peft))
    assert ours.total_kernels < 0.9 * by_peft.total_kernels
    assert ours.total_bytes < 0.7 * by_peft.total_bytes


BLOCKING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda on_device: on_device.sum().item(),
    "float": lambda on_device: float(on_device.mean()),
    "bool": lambda on_device: bool((on_device > 0).all()),
    "copy to the CPU": lambda on_device: on_device.cpu(),
    "tolist": lambda on_device: on_device.cpu().tolist(),
    "nonzero": lambda on_device: on_device.nonzero(),
    "mask": lambda on_device: on_device[on_device > 0],
    "equal": lambda on_device: torch.equal(on_device, on_device),
    "blocking copy to the device": lambda on_device: torch.ones(3).to(on_device.device),
    "blocking copy into a tensor": lambda on_device: on_device.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("kind", BLOCKING)
def test_each_kind_of_host_wait_is_noted_at_its_line(kind: str) -> None:
    with HostWaits() as waits:
        BLOCKING[kind](torch.empty(3, device="meta"))
    assert sum(waits.places.values()) == 1
    assert next(iter(waits.places)).startswith("test_step_counts.py:")


def test_work_on_the_device_and_pinned_copies_are_no_host_waits() -> None:
    with HostWaits() as waits:
        on_device = torch.ones(3).to("meta", non_blocking=True)
        on_device.mul_(2.0).add_(on_device[torch.zeros(2, dtype=torch.int64, device="meta")].sum())
        torch.ones(3).sum().item()
    assert not waits.places


@pytest.fixture
def small(tables: dict) -> Recipe:
    tables["learner"]["micro_batch_size"] = 4
    return Recipe.parse(tables)


@pytest.mark.rotated(every=2, group="longest")
def test_no_host_wait_is_inside_a_step_or_a_micro_batch(small: Recipe) -> None:
    step, task, micro_batch = (waits_of(small)[part] for part in PARTS)
    assert step == 0
    assert micro_batch == 0
    assert task == 3  # images, and whether pixels and latents are finite, when all steps are done


@pytest.mark.rotated(every=2, group="longest")
def test_a_number_read_in_a_transition_is_a_host_wait_of_each_step(
    small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    transition = DDIMTable.transition

    def reading(self: DDIMTable, latents: Tensor, *rest: Any) -> Any:
        latents.mean().item()
        return transition(self, latents, *rest)

    monkeypatch.setattr(DDIMTable, "transition", reading)
    found = waits_of(small)
    assert found[PARTS[0]] == found[PARTS[2]] == 1

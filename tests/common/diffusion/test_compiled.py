"""A compiled network: one shape for any batch, and the same rows and gradients as the network itself."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_ddpo.common.diffusion.compiled import CompiledNetwork, repeated_blocks

ROWS = 4


class Small(nn.Module):
    """A network that is called as diffusers' are and compiles in seconds."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)

    def forward(self, latents: Tensor, timesteps: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        assert not return_dict
        return (torch.sin(self.layer(latents)) * timesteps.unsqueeze(1),)


@pytest.fixture(scope="module")
def network() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture(scope="module")
def compiled(network: Small) -> CompiledNetwork:
    return CompiledNetwork(lambda **given: network(**given, return_dict=False)[0], ROWS)


def inputs(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"latents": torch.randn(11, 3, generator=generator)[:count], "timesteps": torch.arange(1.0, 12.0)[:count]}


@pytest.mark.thorough
@torch.no_grad()
def test_batches_of_any_size_get_the_networks_own_rows_from_one_compiled_shape(
    network: Small, compiled: CompiledNetwork
) -> None:
    torch._dynamo.utils.counters.clear()
    for count in (1, 3, ROWS, 7, 11):
        own = network(**inputs(count), return_dict=False)[0]
        torch.testing.assert_close(compiled(**inputs(count)), own, rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_a_row_has_the_same_bits_in_a_padded_batch_as_in_a_full_one(compiled: CompiledNetwork) -> None:
    whole = compiled(**inputs(ROWS))
    for count in range(1, ROWS):
        assert torch.equal(compiled(**inputs(count)), whole[:count])


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("count", [3, 7])
def test_padding_rows_have_no_part_in_the_gradient(network: Small, compiled: CompiledNetwork, count: int) -> None:
    gradients = []
    for run in (lambda **given: network(**given, return_dict=False)[0], compiled):
        network.zero_grad()
        run(**inputs(count)).square().sum().backward()
        assert network.layer.weight.grad is not None
        gradients.append(network.layer.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0.1


class BasicTransformerBlock(Small):
    """A block under the name of one of diffusers'."""


class Blocks(nn.Module):
    """Two blocks that are compiled, and a layer that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = BasicTransformerBlock(), BasicTransformerBlock(), nn.Linear(3, 3)

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        for block in (self.first, self.second):
            latents = block(latents, timesteps, return_dict=False)[0]
        return self.last(latents)


def test_blocks_alone_are_compiled_with_the_same_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    network = Blocks()
    gradients = []
    for compiles in (False, True):
        blocks = repeated_blocks(network) if compiles else []
        assert len(blocks) == 2 * compiles
        run = CompiledNetwork(network, ROWS, blocks) if compiles else network
        network.zero_grad()
        run(**inputs(3)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    assert all(block._compiled_call_impl is not None for block in (network.first, network.second))
    assert network.last._compiled_call_impl is None and network._compiled_call_impl is None
    torch.testing.assert_close(*gradients)


def test_a_network_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="policy.compile_blocks is true, and Linear has none of the blocks"):
        repeated_blocks(nn.Linear(2, 2))


def test_blocks_are_those_of_the_published_networks() -> None:
    from diffusers import (
        Flux2Transformer2DModel,
        FluxTransformer2DModel,
        HunyuanImageTransformer2DModel,
        Lumina2Transformer2DModel,
        QwenImageTransformer2DModel,
        SanaTransformer2DModel,
        SD3Transformer2DModel,
        UNet2DConditionModel,
        ZImageTransformer2DModel,
    )

    with torch.device("meta"):
        counts = {}
        for network in (
            UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            SD3Transformer2DModel(num_layers=3),
            FluxTransformer2DModel(num_layers=2, num_single_layers=4),
            QwenImageTransformer2DModel(num_layers=5),
            Flux2Transformer2DModel(num_layers=1, num_single_layers=6),
            ZImageTransformer2DModel(n_layers=3),  # and two refiners of 2
            HunyuanImageTransformer2DModel(num_layers=2, num_single_layers=5),
            Lumina2Transformer2DModel(num_layers=4),  # and two refiners of 2
            SanaTransformer2DModel(num_layers=6),
        ):
            names = [type(block).__name__ for block in repeated_blocks(network)]
            counts |= {name: names.count(name) for name in names}
    assert counts == {
        "BasicTransformerBlock": 16,
        "ResnetBlock2D": 22,
        "JointTransformerBlock": 3,
        "FluxTransformerBlock": 2,
        "FluxSingleTransformerBlock": 4,
        "QwenImageTransformerBlock": 5,
        "Flux2TransformerBlock": 1,
        "Flux2SingleTransformerBlock": 6,
        "ZImageTransformerBlock": 7,
        "HunyuanImageTransformerBlock": 2,
        "HunyuanImageSingleTransformerBlock": 5,
        "Lumina2TransformerBlock": 8,
        "SanaTransformerBlock": 6,
    }


def call(network: Small, **given: Any) -> Tensor:
    return network(**given, return_dict=False)[0]


@pytest.mark.thorough
def test_a_process_may_compile_more_networks_than_torch_recompiles_one() -> None:
    """As its sampler, its learner and their copies are: each call of torch.compile's wraps the same code."""
    limit: int = torch._dynamo.config.recompile_limit  # pyright: ignore[reportAttributeAccessIssue]
    for width in range(1, limit + 2):
        network = Small(width)
        compiled = CompiledNetwork(functools.partial(call, network), ROWS)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs(ROWS)), call(network, **inputs(ROWS)), rtol=1e-6, atol=1e-6)

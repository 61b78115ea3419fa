"""Fused adapters: PEFT's output and gradients in float64, as exact in half precision, and the layers left to PEFT."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ray_ddpo.common.diffusion import diffusers_policy
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.lora.adapters import (
    LoraSettings,
    adapted_layers,
    compute_adapters_in,
    read_weights,
    trained_parameters,
    unfused_layers,
)
from ray_ddpo.common.diffusion.lora.fused import fuse_adapters, is_fused
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.network_storage import network_format
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.policy_weights import pack
from tests.tiny_policy import SAMPLING, scatter, tiny_policy

LORA = LoraSettings(rank=3, alpha=6, target_modules=("to_q", "to_k", "to_v", "to_out.0", "proj"))


def network_of(model: Path, dtype: torch.dtype = torch.float64) -> Any:
    network = UNet2DConditionModel.from_pretrained(model / "unet").eval()
    make_trainable(network, "lora", LORA)
    scatter(network, 0.2)
    return network.to(dtype)


def by_peft(network: Any) -> Any:
    """Return a copy of the network whose adapters PEFT computes."""
    network = copy.deepcopy(network)
    for layer in adapted_layers(network).values():
        del layer.forward
    return network


def output(network: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
    return network(latents.to(dtype), torch.tensor([900, 10]), text.to(dtype)).sample


def test_output_and_gradients_are_pefts_in_float64(tiny_model: Path) -> None:
    network = network_of(tiny_model)
    other = by_peft(network)
    assert all(is_fused(layer) for layer in adapted_layers(network).values()) and not unfused_layers(network)
    assert not any(is_fused(layer) for layer in adapted_layers(other).values())
    fused, expected = output(network), output(other)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-10)
    for each in (fused, expected):
        each.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in trained_parameters(other).items()}
    for name, parameter in trained_parameters(network).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-10)


def test_passes_with_and_without_gradients_have_the_same_bits(tiny_model: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        network = network_of(tiny_model, dtype)
        learned = output(network, dtype).detach()
        with torch.no_grad():
            assert torch.equal(output(network, dtype), learned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_as_exact_as_pefts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False), nn.Sequential(nn.Linear(320, 320))
    ).to(dtype)
    for matrix in (layer[0].lora_A, layer[0].lora_B):
        matrix.float()
    rows = torch.randn(512, 320).to(dtype)
    in_float64 = copy.deepcopy(layer).double()(rows.double())
    expected = (in_float64.to(dtype).double() - in_float64).norm() / in_float64.norm()  # of the final rounding alone

    def error() -> float:
        return float((layer(rows).double() - in_float64).norm() / in_float64.norm())

    with torch.autocast("cpu", dtype):
        of_peft = error()
    fuse_adapters(layer)
    assert is_fused(layer[0])
    assert expected < error() < 1.02 * of_peft


class Mixed(nn.Module):
    """Every kind of layer that an adapter goes into."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.label = nn.Linear(8, 8), nn.Conv2d(1, 1, 1), nn.Embedding(5, 8)

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        return self.conv((self.linear(rows) + self.label(labels))[None, None])


def test_convolutions_embeddings_and_dora_are_left_to_peft() -> None:
    network = Mixed()
    make_trainable(network, "lora", LoraSettings(target_modules=("linear", "conv", "label")))
    assert {name for name, layer in adapted_layers(network).items() if is_fused(layer)} == {"linear"}
    dora = inject_adapter_in_model(LoraConfig(target_modules=["0"], use_dora=True), nn.Sequential(nn.Linear(8, 8)))
    fuse_adapters(dora)
    assert not is_fused(dora[0])


def test_layers_left_to_peft_compute_in_half_precision_too() -> None:
    torch.manual_seed(0)
    network = Mixed().to(torch.bfloat16)
    make_trainable(network, "lora", LoraSettings(target_modules=("linear", "conv", "label")))
    scatter(network, 0.2)
    compute_adapters_in(network, "cpu", torch.bfloat16)
    found = network(torch.randn(3, 8).bfloat16(), torch.tensor([0, 4, 2]))
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert all(parameter.grad is not None for parameter in trained_parameters(network).values())


def test_dropout_of_a_network_in_training_is_pefts() -> None:
    settings = LoraConfig(target_modules=["0"], lora_dropout=0.9, init_lora_weights=False)
    network = inject_adapter_in_model(settings, nn.Sequential(nn.Linear(8, 8)))
    fuse_adapters(network)
    rows = torch.randn(4, 8)
    assert torch.equal(network.eval()(rows), network(rows))
    assert not torch.equal(network.train()(rows), network(rows))


@pytest.mark.parametrize("keys", [{"train": "lora"}, {"train": "full"}], ids=str)
def test_a_samplers_weights_are_stored_in_half_precision_to_the_learners_bits(keys: dict, tiny_model: Path) -> None:
    """Published float32 weights give equal bits, though the sampler rounds them once and the learner in each pass."""
    keys |= {"dtype": "bfloat16"}
    learner, sampler = (tiny_policy(tiny_model, role, **keys) for role in ("learner", "sampler"))
    weights = read_weights(learner.network, 3)
    sampler.load_weights(weights)
    rows = select_rows(sampler.encode(["a cat", "a dog"]), torch.arange(2))
    latents, steps = torch.randn(2, *learner.latent_shape), torch.tensor([0, 2])
    with torch.no_grad():
        pair = [policy.transition(latents, steps, rows).mean for policy in (learner, sampler)]
    assert torch.equal(*pair) and pair[0].isfinite().all()
    of_learner, of_sampler = (trained_parameters(policy.network) for policy in (learner, sampler))
    assert {value.dtype for value in of_learner.values()} == {torch.float32}
    halved = {name for name, value in of_sampler.items() if value.dtype == torch.bfloat16}
    norms = {name for name in of_sampler if "norm" in name}
    assert halved == of_sampler.keys() - norms
    rounded = {name: value.to(of_sampler[name].dtype).float().numpy() for name, value in _detached(of_learner).items()}
    assert read_weights(sampler.network, 3).fingerprint == pack(3, rounded).fingerprint


def _detached(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in parameters.items()}


def test_merged_samplers_keep_float32_adapters(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, "sampler", dtype="bfloat16", merge_adapters=True)
    assert {value.dtype for value in trained_parameters(policy.network).values()} == {torch.float32}


def test_rows_prepared_once_a_task_give_the_same_bits(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, "sampler", dtype="bfloat16")
    rows = select_rows(policy.encode(["a cat", "a dog"]), torch.arange(2))
    rows = {name: value.float() for name, value in rows.items()}
    latents, steps = torch.randn(2, *policy.latent_shape), torch.tensor([0, 2])
    with torch.no_grad():
        plain, prepared = (policy.transition(latents, steps, given) for given in (rows, policy.rows_of_task(rows)))
    assert torch.equal(plain.mean, prepared.mean)
    assert policy.rows_of_task(rows).keys() > rows.keys()


def test_only_compiled_networks_on_a_gpu_are_channels_last(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def format_of(device: str, is_compiled: bool, has_frames: bool) -> torch.memory_format:
        asked.append((device, is_compiled))
        return network_format("cuda", is_compiled, has_frames)  # as on a GPU

    monkeypatch.setattr(diffusers_policy, "network_format", format_of)
    formats = {}
    for role in ("sampler", "learner"):
        policy = StableDiffusion(model=str(tiny_model), compile="sampler").load("cpu", SAMPLING, role)
        weight = policy.network.mid_block.resnets[0].conv1.weight
        formats[role] = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert asked == [("cpu", True), ("cpu", False)]
    assert formats == {"sampler": True, "learner": False}
    assert network_format("cpu", True) == network_format("cuda:0", False) == torch.contiguous_format


@pytest.mark.rotated(every=2, group="longest")
def test_the_memory_prediction_has_each_roles_format(tiny_model: Path) -> None:
    eager, sampler, both = (
        StableDiffusion.model_validate({"model": str(tiny_model), "compile": compiled}).sizes(SAMPLING, "cuda")
        for compiled in ("none", "sampler", "both")
    )
    assert eager.learner == sampler.learner != both.learner
    assert eager.sampling != sampler.sampling == both.sampling
    assert eager.decoding.each == both.decoding.each

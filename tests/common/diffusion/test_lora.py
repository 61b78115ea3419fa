"""Adapters: attached, published, refused if they do not fit, and read by plain diffusers."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from ray_ddpo.common.diffusion.lora import adapters
from ray_ddpo.common.diffusion.lora.adapters import (
    LoraSettings,
    MergedAdapters,
    compute_adapters_in,
    load_lora,
    load_weights,
    read_lora_settings,
    read_weights,
    reference_policy,
    save_lora,
    trained_parameters,
)
from ray_ddpo.common.diffusion.lora.files import FILE_NAME, lora_file
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.policy_weights import pack
from tests.tiny_policy import scatter

RANK_2 = LoraSettings(rank=2, alpha=6, target_modules=("to_q", "to_v"))


def network_with(model: Path, lora: LoraSettings, seed: int | None = 1) -> UNet2DConditionModel:
    """Return the tiny network with adapters, changed from their start unless `seed` is None."""
    network = UNet2DConditionModel.from_pretrained(model / "unet").eval()
    make_trainable(network, "lora", lora)
    if seed is not None:
        scatter(network, 0.2, seed)
    return network


@torch.no_grad()
def output(network: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
    return network(latents, torch.tensor([900, 10]), text).sample


def test_new_adapters_are_the_only_parameters_with_gradients_and_change_nothing(tiny_model: Path) -> None:
    network = network_with(tiny_model, LoraSettings(), seed=None)
    assert all("lora_" in name for name in trained_parameters(network))
    # 1 + 1 + 2 attention blocks on the way down, in the middle and up; 8 projections each, with matrices A and B
    assert len(trained_parameters(network)) == 4 * 8 * 2
    pretrained = UNet2DConditionModel.from_pretrained(tiny_model / "unet").eval()
    torch.testing.assert_close(output(network), output(pretrained), rtol=0, atol=1e-6)


def test_the_reference_policy_is_the_pretrained_network_and_ends_with_its_block(tiny_model: Path) -> None:
    network, pretrained = network_with(tiny_model, RANK_2), UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    adapted = output(network)
    with reference_policy(network):
        assert torch.equal(output(network), output(pretrained.eval()))
    assert torch.equal(output(network), adapted)
    assert not torch.allclose(adapted, output(pretrained), atol=1e-3)


def test_a_saved_adapter_comes_back_to_the_same_bits(tiny_model: Path, tmp_path: Path) -> None:
    network = network_with(tiny_model, RANK_2)
    save_lora(network, RANK_2, tmp_path)
    other = network_with(tiny_model, RANK_2, seed=7)
    assert not torch.equal(output(other), output(network))
    load_lora(other, tmp_path)
    assert torch.equal(output(other), output(network))


def test_rank_alpha_and_modules_are_read_back_from_the_file(tiny_model: Path, tmp_path: Path) -> None:
    save_lora(network_with(tiny_model, RANK_2), RANK_2, tmp_path)
    assert read_lora_settings(lora_file(tmp_path)) == RANK_2


@pytest.mark.parametrize("lora", [LoraSettings(), RANK_2], ids=["alpha_equals_rank", "alpha_three_times_rank"])
def test_plain_diffusers_loads_the_file_to_the_same_network(
    lora: LoraSettings, tiny_model: Path, tmp_path: Path
) -> None:
    network = network_with(tiny_model, lora)
    save_lora(network, lora, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)
    before = output(pipeline.unet.eval())
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(pipeline.unet), output(network), rtol=0, atol=1e-6)
    assert not torch.allclose(output(network), before, atol=1e-3)


SAVE_IN_A_PROCESS_OF_ITS_OWN = """
import sys
from pathlib import Path
import torch
from tests.common.diffusion.test_lora import save_fresh_adapter
torch.manual_seed(0)
save_fresh_adapter(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def save_fresh_adapter(model: Path, folder: Path) -> None:
    save_lora(network_with(model, LoraSettings()), LoraSettings(), folder)


@pytest.mark.thorough
def test_equal_weights_give_an_equal_file_in_processes_that_hash_differently(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)  # of the adapters
    save_fresh_adapter(tiny_model, tmp_path / "here")
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = [sys.executable, "-c", SAVE_IN_A_PROCESS_OF_ITS_OWN, str(tiny_model), str(tmp_path / "there")]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], check=True, timeout=120)
    here, there = ((tmp_path / folder / FILE_NAME).read_bytes() for folder in ("here", "there"))
    assert here == there and len(here) > 1000


def test_a_lora_of_another_rank_is_refused_with_the_names_that_differ(tiny_model: Path, tmp_path: Path) -> None:
    save_lora(network_with(tiny_model, RANK_2), RANK_2, tmp_path)
    network = network_with(tiny_model, RANK_2.model_copy(update={"rank": 3}))
    with pytest.raises(ValueError, match=r"does not fit the network at \['.*to_q.*another model, or another rank"):
        load_lora(network, tmp_path)


def test_a_path_without_a_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run with a LoRA, no folder with pytorch_lora_weights.safetensors"):
        lora_file(tmp_path)


def test_a_file_that_is_no_safetensors_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"broken\.safetensors cannot be read, it is damaged"):
        read_lora_settings(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("target_modules", [("to_nothing",), ("to_q", "to_kk"), ("o_q",)], ids=str)
def test_target_modules_that_the_network_has_not_are_refused(target_modules: tuple[str, ...], tiny_model: Path) -> None:
    network = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    with pytest.raises(
        ValueError,
        match=rf"policy.lora.target_modules is .*: the network has no module called \['{target_modules[-1]}'\]",
    ):
        make_trainable(network, "lora", LoraSettings(target_modules=target_modules))


def test_published_weights_make_another_network_the_same(tiny_model: Path) -> None:
    network, other = network_with(tiny_model, RANK_2), network_with(tiny_model, RANK_2, seed=7)
    weights = read_weights(network, 3)
    assert load_weights(other, weights) == len(trained_parameters(network))
    assert torch.equal(output(other), output(network))
    assert read_weights(other, 3).fingerprint == weights.fingerprint


class HostCopies(TorchDispatchMode):
    """Number of tensors that were copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("piece", "copies"), [(2**24, 1), (130, 16), (1, 32)])
def test_weights_reach_a_device_in_few_copies(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, piece: int, copies: int
) -> None:
    monkeypatch.setattr(adapters, "PIECE", piece)
    network, other = network_with(tiny_model, RANK_2), network_with(tiny_model, RANK_2, seed=7)
    weights = read_weights(network, 3)
    weights.buffer.flags.writeable = False  # as a view of Ray's store is
    load_weights(other, weights)
    assert read_weights(other, 3).fingerprint == weights.fingerprint
    on_device = other.to("meta")  # stands in for a GPU
    with HostCopies() as counted:
        load_weights(on_device, weights)
    assert counted.count == copies


def test_published_weights_are_a_copy_that_later_training_does_not_change(tiny_model: Path) -> None:
    network = network_with(tiny_model, RANK_2)
    weights = read_weights(network, 0)
    before = weights.buffer.copy()
    scatter(network, 1.0)
    assert (weights.buffer == before).all()
    assert read_weights(network, 0).fingerprint != weights.fingerprint


def test_weights_damaged_in_transit_are_refused_with_both_fingerprints(tiny_model: Path) -> None:
    network = network_with(tiny_model, RANK_2)
    weights = read_weights(network, 4)
    buffer = weights.buffer.copy()
    buffer[17] += 1e-3
    damaged = dataclasses.replace(weights, buffer=buffer)
    actual = pack(4, damaged.arrays()).fingerprint
    text = f"version 4 arrived with fingerprint {actual[:12]}, and were sent with {weights.fingerprint[:12]}"
    with pytest.raises(ValueError, match=text):
        load_weights(network, damaged)
    assert read_weights(network, 4).fingerprint == weights.fingerprint


def test_weights_of_other_names_are_refused_with_what_is_lacking_and_what_is_foreign(tiny_model: Path) -> None:
    network = network_with(tiny_model, RANK_2)
    arrays = read_weights(network, 5).arrays()
    name = next(iter(arrays))
    renamed = pack(5, {("stranger" if key == name else key): value for key, value in arrays.items()})
    with pytest.raises(
        ValueError, match=r"version 5 do not fit the network: it lacks \[\('stranger'.*still needs"
    ) as error:
        load_weights(network, renamed)
    assert name in str(error.value)


def test_merged_adapters_give_the_same_output_and_forget_the_version_before(tiny_model: Path) -> None:
    network, separate = network_with(tiny_model, RANK_2), network_with(tiny_model, RANK_2)
    first, second = read_weights(network, 1), read_weights(network_with(tiny_model, RANK_2, seed=2), 2)
    merged, seen = MergedAdapters(network), []
    for weights in (first, second, first):
        load_weights(network, weights)
        load_weights(separate, weights)
        merged.merge()
        seen.append(output(network))
        torch.testing.assert_close(seen[-1], output(separate), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[0], seen[2])  # to the bit, however many versions came between
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    assert len(trained_parameters(network)) == len(trained_parameters(separate))


def test_adapters_compute_in_half_precision_and_norms_are_not_widened(tiny_model: Path) -> None:
    network = network_with(tiny_model, RANK_2).to(torch.bfloat16)
    for parameter in trained_parameters(network).values():
        parameter.data = parameter.data.float()
    layer = next(module for name, module in network.named_modules() if name.endswith("attn1.to_q"))
    rows = torch.randn(2, 8, layer.get_base_layer().in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(rows)
    compute_adapters_in(network, "cpu", torch.bfloat16)
    assert torch.equal(layer(rows), expected) and layer(rows).dtype == torch.bfloat16
    dtypes: set[torch.dtype] = set()
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, given, result: dtypes.update((given[0].dtype, result.dtype)))
    result = network(
        torch.randn(2, 4, 8, 8).bfloat16(), torch.tensor([900, 10]), torch.randn(2, 8, 16).bfloat16()
    ).sample
    result.float().square().mean().backward()
    assert dtypes == {torch.bfloat16}
    assert {parameter.grad.dtype for parameter in trained_parameters(network).values()} == {torch.float32}

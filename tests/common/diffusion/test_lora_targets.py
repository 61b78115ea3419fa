"""Adapters go into any module: their targets are checked, and they learn, save and switch off as in diffusers' networks."""

from pathlib import Path

import pytest
import torch
from shape_network import ShapeNetwork
from torch import nn

from ray_ddpo.common.diffusion.lora.adapters import (
    LoraSettings,
    MergedAdapters,
    read_lora_settings,
    read_weights,
    reference_policy,
)
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.memory.meta_device import IntegerIndices
from ray_ddpo.common.diffusion.trained_weights import restore_trained, save_trained, stored_weights
from tests.tiny_policy import scatter

LORA = LoraSettings(rank=2, alpha=4, target_modules=("label", "enter", "shift"))


class OnlyNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 3)


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.enter = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("targets", "network", "message"),
    [
        (
            ("to_q",),
            ShapeNetwork,
            "the network has no module called ['to_q']; its layers are label, time.0, time.2, enter, down, ",
        ),
        (
            ("enter", "time"),
            ShapeNetwork,
            "time is a Sequential, which an adapter cannot go into; it must name layers among label,",
        ),
        (
            ("out_proj",),
            TorchAttention,
            "attention.out_proj is a NonDynamicallyQuantizableLinear, which an adapter cannot go into",
        ),
        (("norm",), OnlyNorms, "OnlyNorms has no Linear, Conv or Embedding layer that an adapter could go into"),
    ],
)
def test_targets_that_no_adapter_can_go_into_are_named_with_those_there_are(
    targets: tuple[str, ...], network: type[nn.Module], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        make_trainable(network(), "lora", LoraSettings(target_modules=targets))
    assert message in str(error.value) and f"policy.lora.target_modules is {list(targets)}" in str(error.value)


class Tied(ShapeNetwork):
    """Has one tensor under two names, a buffer, and weights that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.shift
        self.register_buffer("scale", torch.ones(3))
        self.middle.weight.data = self.middle.weight.data.to(memory_format=torch.channels_last)


def made(train: str, seed: int, network: type[ShapeNetwork] = ShapeNetwork) -> ShapeNetwork:
    torch.manual_seed(0)
    plain = network()
    make_trainable(plain, train, LORA)
    scatter(plain, 0.2, seed)
    return plain


@torch.no_grad()
def output(network: nn.Module) -> torch.Tensor:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return network(images, torch.tensor([900, 10]), torch.tensor([0, 4]))


@pytest.mark.parametrize(("train", "network"), [("lora", ShapeNetwork), ("full", ShapeNetwork), ("full", Tied)])
def test_a_plain_modules_weights_come_back_to_the_same_bits(
    train: str, network: type[ShapeNetwork], tmp_path: Path
) -> None:
    first, second = made(train, 1, network), made(train, 2, network)
    path = save_trained(first, train, LORA, tmp_path, "unet")
    assert not torch.equal(output(first), output(second))
    restore_trained(second, train, path)
    assert torch.equal(output(first), output(second))
    weights = read_weights(first, 3)
    assert stored_weights(tmp_path, weights.manifest, 3).fingerprint == weights.fingerprint
    if train == "lora":
        assert read_lora_settings(path) == LORA.model_copy(update={"target_modules": ("enter", "label", "shift")})


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    path = save_trained(made("full", 1), "full", LORA, tmp_path, "unet")
    with pytest.raises(
        ValueError, match=r"do not fit Linear at \['bias', 'down.bias', 'down.weight'\]: another network"
    ):
        restore_trained(nn.Linear(2, 2), "full", path)
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model.safetensors"):
        restore_trained(nn.Linear(2, 2), "full", tmp_path)
    (path / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read, it is damaged"):
        restore_trained(made("full", 1), "full", path)
    with pytest.raises(ValueError, match=r"the part 'denoiser': it must be one of \['unet', 'transformer'\]"):
        save_trained(made("full", 1), "full", LORA, tmp_path, "denoiser")


def test_a_plain_modules_adapters_switch_off_and_merge() -> None:
    network, adapted = made("lora", 1), output(made("lora", 1))
    with reference_policy(network):
        torch.manual_seed(0)
        assert torch.equal(output(network), output(ShapeNetwork()))
    assert torch.equal(output(network), adapted)
    MergedAdapters(network).merge()
    torch.testing.assert_close(output(network), adapted, rtol=1e-4, atol=1e-4)


def test_floating_zeros_stand_for_labels_where_something_is_looked_up() -> None:
    table, labels = torch.arange(6.0).view(3, 2), torch.tensor([0.0, 2.0])
    with IntegerIndices():
        rows = nn.functional.embedding(labels, table), table[labels], table.index_select(0, labels)
        assert nn.functional.one_hot(labels, 3).tolist() == [[1, 0, 0], [0, 0, 1]]
        assert torch.equal(labels + 0.5, torch.tensor([0.5, 2.5]))
    for found in rows:
        assert torch.equal(found, torch.tensor([[0.0, 1.0], [4.0, 5.0]]))

"""A rank of a learner with sharded weights reads its rows of the network's files, and never holds the rest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake", which sends nothing

from ray_ddpo.common.diffusion.host_loading import (
    HostLoading,
    loads_on_host,
    may_leave_unread,
    network_on_host,
    read_all_weights,
)
from ray_ddpo.common.diffusion.loading.unread_network import unread_network
from ray_ddpo.common.diffusion.memory.live_bytes import LiveBytes
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.learner.sharding.layout import rows_of
from ray_ddpo.learner.sharding.sharded_loading import read_own_rows, shard_unread
from ray_ddpo.learner.sharding.sharded_network import shard_network
from tests.loaded_models import config_of
from tests.tiny_families import save_tiny_flux, save_tiny_sd3

SAMPLING = SamplingTable(num_steps=4)
WORLD_SIZE = 3  # which divides few of the parameters
SEED = 3


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "stable_diffusion": tiny_model,
        "sd3": save_tiny_sd3(tmp_path_factory.mktemp("sd3")),
        "flux": save_tiny_flux(tmp_path_factory.mktemp("flux")),
    }


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=WORLD_SIZE)
    yield request.param
    distributed.destroy_process_group()


def loaded(config: Any, on_host: bool) -> tuple[nn.Module, HostLoading]:
    with torch.random.fork_rng(devices=[]), network_on_host(on_host) as loading:
        torch.manual_seed(SEED)
        return config.load("cpu", SAMPLING, "learner").network, loading


def save_deep_sd3(folder: Path) -> Path:
    """Write a pipeline with a transformer of eight blocks, so that one tensor is a small part of the network."""
    save_tiny_sd3(folder)
    keys: Any = dict(SD3Transformer2DModel.load_config(folder / "transformer"))
    keys |= {"num_layers": 8, "attention_head_dim": 32, "caption_projection_dim": 64}
    SD3Transformer2DModel.from_config(keys).save_pretrained(folder / "transformer", safe_serialization=True)
    return folder


def shard_from_files(network: nn.Module, loading: HostLoading, offload: bool = False) -> None:
    """Shard as a rank does, without the collectives that compare ranks."""
    assert loading.unread is not None
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    shard_unread(network, loading.unread)
    shard_network(network, mesh, offload)
    read_own_rows(network, loading.unread, mesh, offload)


class PlainBytes(LiveBytes):
    """Bytes of all tensors but DTensors, whose storage is that of their local tensors."""

    def _keep(self, tensor: Tensor) -> None:
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            super()._keep(tensor)


def stored_in(folder: Path, dtype: torch.dtype) -> Path:
    """Convert the files of a pipeline's transformer. Weights in another dtype are never used in the file's memory."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
    return folder


@pytest.mark.parametrize("rank", [1], indirect=True)
def test_loading_takes_a_ranks_rows_and_one_more_tensor(tmp_path: Path, rank: int) -> None:
    model = stored_in(save_deep_sd3(tmp_path), torch.bfloat16)
    config = config_of("sd3", model, train="full")  # float32
    with PlainBytes() as before:
        whole, _ = loaded(config, on_host=False)
    weights = sum(each.nbytes for each in whole.parameters())
    largest = max(each.nbytes for each in whole.parameters())
    del whole
    with PlainBytes() as counted:
        network, loading = loaded(config, on_host=True)
        shard_from_files(network, loading)
    buffers = sum(each.nbytes for each in network.buffers())
    print(f"of {weights} bytes: {before.peak} if loaded whole, {counted.peak} for a rank of {WORLD_SIZE}")
    assert before.peak > weights
    assert weights / WORLD_SIZE < counted.peak < weights / WORLD_SIZE + 2 * (largest + buffers)
    assert counted.peak < 0.5 * before.peak


@pytest.mark.parametrize("rank", [2], indirect=True)
def test_what_is_not_finite_in_a_ranks_rows_is_refused(tmp_path: Path, rank: int) -> None:
    model = save_tiny_sd3(tmp_path)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"][-1] = torch.inf  # the last rank's
    save_file(tensors, file)
    network, loading = loaded(config_of("sd3", model), on_host=True)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors: the tensor proj_out.weight holds NaN"):
        shard_from_files(network, loading)


def test_a_file_with_other_names_is_loaded_whole(models: dict[str, Path], tmp_path: Path) -> None:
    network_class, files = SD3Transformer2DModel, ["diffusion_pytorch_model.safetensors"]
    stored = load_file(models["sd3"] / "transformer" / files[0])
    (tmp_path / "config.json").write_bytes((models["sd3"] / "transformer" / "config.json").read_bytes())
    with network_on_host() as loading:
        save_file({f"old.{name}": value for name, value in stored.items()}, tmp_path / files[0])
        assert unread_network(network_class, tmp_path, files, torch.float32) is None
        assert loading.unread is None and may_leave_unread()
        save_file(stored, tmp_path / files[0])
        assert unread_network(network_class, tmp_path, files, torch.float32) is not None
        assert loading.unread is not None
        read_all_weights()
        assert not may_leave_unread() and loads_on_host(), "a user's own family may compute with its weights"


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("rank", [0, 2], indirect=True)
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("stable_diffusion", {"train": "lora", "dtype": "bfloat16"}),
        ("sd3", {"train": "full", "dtype": "bfloat16", "gradient_checkpointing": True}),
        ("flux", {"train": "lora"}),
        ("flux", {"train": "full"}),
    ],
)
def test_a_ranks_rows_have_the_bits_of_a_network_that_was_loaded_whole(
    models: dict[str, Path], family: str, keys: dict, rank: int
) -> None:
    config = config_of(family, models[family], **keys)
    whole, none_left = loaded(config, on_host=False)
    network, loading = loaded(config, on_host=True)
    assert none_left.unread is None and type(network) is type(whole) and network.config == whole.config
    expected = dict(whole.named_parameters())
    shard_from_files(network, loading, offload=keys["train"] == "full")
    found: dict[str, Any] = dict(network.named_parameters())
    assert list(found) == list(expected)
    for name, parameter in found.items():
        rows = expected[name].detach()[rows_of(len(expected[name]), rank, WORLD_SIZE)]
        local = parameter.to_local().detach()
        assert parameter.requires_grad == expected[name].requires_grad and parameter.shape == expected[name].shape
        assert local.dtype == rows.dtype and torch.equal(local, rows), name
    for (name, buffer), (other, wanted) in zip(network.named_buffers(), whole.named_buffers(), strict=True):
        assert name == other and buffer.dtype == wanted.dtype and torch.equal(buffer, wanted)
    modes = [(each.training, getattr(each, "gradient_checkpointing", None)) for each in network.modules()]
    assert modes == [(each.training, getattr(each, "gradient_checkpointing", None)) for each in whole.modules()]

"""`ddpo plan` of learners with sharded weights, compared with FSDP2's own shards of FLUX's twelve billion parameters."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake", which sends nothing

from ray_ddpo.common.diffusion.families.flux import DEV
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.plan.numbers import plan_of
from ray_ddpo.deploy.commands.plan.plan import plan
from ray_ddpo.learner.sharding.sharded_network import local_shards, shard_network
from tests.conftest import small_tables

FAMILIES = Path("deploy/recipes/families")
pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("counted_once")]  # counts FLUX: half a minute


@pytest.fixture
def alone_of_many() -> Iterator[None]:
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def flux_on_meta(train: str) -> nn.Module:
    """Return FLUX.1-dev's transformer as a learner has it, without memory."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config(DEV["transformer"])
    settings = Recipe.load(FAMILIES / "flux_dev_sharded.toml").policy.table()["lora"]
    make_trainable(network.bfloat16(), train, LoraSettings(**settings))
    return network


def counted_bytes(network: nn.Module, world_size: int) -> tuple[int, int]:
    """Return the bytes of rank 0's shards with gradients and AdamW's state, and of the largest block, by FSDP2."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    shard_network(network, init_device_mesh("cpu", (world_size,)))
    held = sum(parameter.to_local().nbytes for parameter in network.parameters())
    trained = sum(shard.numel() for shard in local_shards(network).values())
    blocks = [
        sum(each._orig_size.numel() * each.sharded_param.dtype.itemsize for each in group.fsdp_params)
        for module in network.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]
    return held + (4 + 8) * trained, max(blocks)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize(("train", "recipe"), [("lora", "flux_dev_sharded"), ("full", "flux_dev_full")])
def test_bytes_a_rank_are_those_of_fsdps_shards(train: str, recipe: str, world_size: int, alone_of_many: None) -> None:
    loaded = Recipe.load(FAMILIES / f"{recipe}.toml", ["--learner.world_size", str(world_size)])
    units, unsharded = (
        plan_of(loaded).sizes.units,
        plan_of(Recipe.load(FAMILIES / f"{recipe}.toml", ["--learner.world_size", "1"])),
    )
    network = flux_on_meta(train)
    whole = sum(parameter.nbytes for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    # What the step needs beside weights, gradients and AdamW's state: activations, and without sharding autocast's copies.
    beside = unsharded.sizes.learner.of(1) - whole - 12 * trained
    beside -= 2 * trained if train == "full" else 0
    held, block = counted_bytes(network, world_size)
    gradients = block if train == "full" else units.largest_gradients
    expected = held + 3 * block + 2 * gradients + beside
    found = plan_of(loaded).sizes.learner.of(1)
    print(f"{train}, {world_size} ranks: {found / 1e9:.2f} GB by plan, {expected / 1e9:.2f} GB counted")
    assert units.largest == block and units.weights == whole
    assert found == pytest.approx(expected, rel=0.1)


def test_a_plan_tells_what_a_rank_holds_and_gathers(tiny_model: Path, tmp_path: Path) -> None:
    tables = small_tables(tiny_model, tmp_path)
    tables["learner"] |= {"world_size": 2, "shard_weights": True}
    tables["policy"] |= {"train": "full"}
    sharded = Recipe.parse(tables)
    text = plan(sharded)
    assert "sharded weights" in text and "gathered at a time" in text and "gradient all-reduce" not in text
    tables["learner"]["shard_weights"] = False
    whole = Recipe.parse(tables)
    assert "gathered at a time" not in plan(whole) and "gradient all-reduce" in plan(whole)
    sizes, units = plan_of(sharded).sizes, plan_of(sharded).sizes.units
    saved = (units.weights + 12 * sizes.trained_parameters) // 2 - units.gathered
    assert plan_of(whole).learner_bytes - plan_of(sharded).learner_bytes == pytest.approx(saved, abs=2)


def test_offloaded_shards_take_no_memory_of_the_device(tiny_model: Path, tmp_path: Path) -> None:
    tables = small_tables(tiny_model, tmp_path)
    tables["learner"] |= {"world_size": 2, "shard_weights": True}
    kept = plan_of(Recipe.parse(tables))
    tables["learner"] |= {"offload_weights": True}
    offloaded = Recipe.parse(tables)
    units, trained = kept.sizes.units, kept.sizes.trained_parameters
    assert kept.learner_bytes - plan_of(offloaded).learner_bytes == pytest.approx(
        (units.weights + 12 * trained) / 2, abs=3
    )
    assert "in the host's memory" in plan(offloaded)

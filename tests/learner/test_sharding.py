"""The parts of sharded weights that need no second process: rows, blocks, gathering, refusals and saved networks."""

import hashlib
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as distributed
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ray_ddpo.common.diffusion.units import parameters_by_unit, units_of
from ray_ddpo.common.policy_weights import fingerprint, pack
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.sharding.layout import rows_of, shard_name, shard_shape, shards_weights
from ray_ddpo.learner.sharding.sharded_network import check_shardable, filled, shard_network, unsharded_twin
from ray_ddpo.learner.sharding.weight_shards import averaged_shards, buckets, shards_of, whole_weights
from tests.rank_processes import with_changes

SHARDED = {"learner": {"world_size": 2, "shard_weights": True}}


class Network(nn.Module):
    """Two blocks, one of which holds a list of its own, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2))
        self.first = nn.Linear(3, 2)
        self.blocks = nn.ModuleList([inner, nn.Linear(2, 5), nn.ReLU()])
        self.last = nn.Linear(5, 1)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_hold_the_rows_of_torchs_chunks(length: int, world_size: int) -> None:
    chunks = torch.arange(length).chunk(world_size)
    expected = [chunk.tolist() for chunk in chunks] + [[]] * (world_size - len(chunks))
    assert [list(range(length))[rows_of(length, rank, world_size)] for rank in range(world_size)] == expected
    assert [shard_shape((length, 3), rank, world_size)[0] for rank in range(world_size)] == list(map(len, expected))


def test_blocks_are_the_elements_of_the_outermost_lists() -> None:
    network = Network()
    assert units_of(network) == [network.blocks[0], network.blocks[1]], "a block without parameters is none"
    *_, rest = parameters_by_unit(network)
    assert rest == [*network.first.parameters(), *network.last.parameters()]
    assert units_of(nn.Linear(1, 1)) == []


def test_a_single_number_cannot_be_sharded() -> None:
    network = Network()
    network.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"the parameter scale of Network is a single number .* shape \(1,\)"):
        check_shardable(network)


def test_buckets_hold_whole_parameters_in_order() -> None:
    manifest = (("a", (4,)), ("b", (2, 3)), ("c", (1,)), ("d", (20,)), ("e", (3,)), ("f", (3,)))
    names = [[name for name, _ in bucket] for bucket in buckets(manifest, 40)]
    assert names == [["a", "b"], ["c"], ["d"], ["e", "f"]]


def test_one_ranks_shards_are_the_whole_weights_with_their_fingerprint() -> None:
    alone = ProcessGroup()
    old, new = (pack(version, {"a": np.full((3, 2), value, np.float32)}) for version, value in ((3, 1.0), (4, 5.0)))
    held = shards_of(old, alone)
    assert held.fingerprint == old.fingerprint == fingerprint(old.buffer, old.manifest)
    back = whole_weights(held, alone)
    assert back is not None and back.fingerprint == old.fingerprint and np.array_equal(back.buffer, old.buffer)
    average = averaged_shards(held, shards_of(new, alone), 0.25, alone)
    expected = pack(4, {"a": np.full((3, 2), 0.25 * 1 + 0.75 * 5, np.float32)})
    assert (average.policy_version, average.fingerprint) == (4, expected.fingerprint)
    assert len(average.fingerprint) == hashlib.sha256().digest_size * 2


def test_no_two_ranks_shards_have_one_name() -> None:
    assert shard_name("block.weight", 1, 4) == "block.weight.shard-00002-of-00004"


def test_a_twin_has_weights_only_while_it_is_saved() -> None:
    network = Network()
    network.first.requires_grad_(False)
    twin = unsharded_twin(network)
    assert all(parameter.is_meta for parameter in twin.parameters())
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in network.named_parameters()]
    arrays = {name: value.detach().numpy() for name, value in network.named_parameters() if value.requires_grad}
    with filled(twin, arrays):
        assert torch.equal(twin.get_parameter("last.weight"), network.last.weight)
        assert twin.get_parameter("first.weight").is_meta and twin.get_parameter("last.weight").requires_grad is True
    assert all(parameter.is_meta for parameter in twin.parameters())


def test_rows_passed_for_others_have_no_part_in_the_loss() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    result = TransitionLoss(2 * values, log_ratio=values.detach(), terms={"policy": 2 * values}).first(2)
    assert result.loss.tolist() == [2.0, 4.0] and result.log_ratio is not None and len(result.log_ratio) == 2
    result.loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [2.0, 2.0, 0.0]
    none = TransitionLoss(2 * values).first(0)
    none.loss.sum().backward()
    assert values.grad.tolist() == [2.0, 2.0, 0.0], "a pass for others' sake alone"


PROXIMAL = {"ratio": "proximal"}
REFUSED: list[tuple[dict, str]] = [
    ({"learner": {"offload_weights": True}}, "offload_weights is true and shard_weights false"),
    (with_changes(SHARDED, {"learner": {"optimizer": "adamw_8bit"}}), "shard_weights is true and learner.optimizer"),
    (with_changes(SHARDED, {"learner": {"num_gpus": 0.5}}), "ranks may share a GPU"),
    (with_changes(SHARDED, {"policy": {"compile": "both"}}), 'policy.compile "both"'),
    (with_changes(SHARDED, {"policy": {"cuda_graphs": True}}), "shard_weights is true and policy.cuda_graphs too"),
    (
        with_changes(SHARDED, {"policy": {"sampler_dtype": "bfloat16"}, "algorithm": {"off_policy": PROXIMAL}}),
        "leave out policy.sampler_dtype",
    ),
    (
        with_changes(SHARDED, {"policy": {"dtype": "float16"}, "learner": {"offload_weights": True}}),
        "learner.offload_weights is true and policy.dtype",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_sharded_weights_cannot_be_combined_with_is_refused(tables: dict, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        components_of(Recipe.parse(with_changes(tables, changes)))


def test_one_rank_has_nothing_to_shard(tables: dict) -> None:
    recipe = Recipe.parse(with_changes(tables, {"learner": {"shard_weights": True}, "policy": {"compile": "both"}}))
    assert not shards_weights(recipe.learner)
    components_of(recipe)


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def flux_gradients(sharded: bool) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss on the output of a small FLUX transformer, whose single blocks return views."""
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4)}
    heads = {"attention_head_dim": 8, "num_attention_heads": 1, "num_layers": 1, "num_single_layers": 2}
    network = FluxTransformer2DModel(**sizes, **heads)
    if sharded:
        shard_network(network, init_device_mesh("cpu", (1,)))
    generator = torch.Generator().manual_seed(1)
    latents, text, pooled = (torch.randn(size, generator=generator) for size in ((1, 6, 4), (1, 3, 8), (1, 8)))
    (output,) = network(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.ones(1),
        img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )
    output.square().sum().backward()
    return {
        name: each.grad.full_tensor() if isinstance(each.grad, DTensor) else each.grad
        for name, each in network.named_parameters()
        if each.grad is not None
    }


def test_blocks_of_flux_that_return_views_have_their_gradients_and_no_warning(one_rank: None) -> None:
    expected = flux_gradients(sharded=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        gradients = flux_gradients(sharded=True)
    assert not [each for each in found if "view" in str(each.message)]
    assert gradients.keys() == expected.keys() and all(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


class Halves(nn.Module):
    """A block of a user's own that returns a view, as FLUX's single blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.layer(values)[:, :2]


def test_fsdp_still_warns_of_views_of_a_users_own_network(one_rank: None) -> None:
    network = nn.Sequential(nn.ModuleList([Halves()]))
    with pytest.warns(UserWarning, match="FSDPHalves.* returned a view tensor"):
        shard_network(network, init_device_mesh("cpu", (1,)))
        network[0][0](torch.ones(1, 4)).sum().backward()

"""An optimizer with state sharded across ranks gives the bits of an unsharded one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.common.recipe.tables import LearnerTable
from ray_ddpo.learner import process_group as rank_group
from ray_ddpo.learner.optimization.sharded_optimizer import ShardedOptimizer, owners_of
from ray_ddpo.learner.process_group import ProcessGroup
from tests.conftest import small_tables
from tests.rank_processes import Case, Outcome, run_in_ranks, with_changes

Outcomes = dict[str, list[Outcome]]
TWO_RANKS = {"batch_size": 4, "world_size": 2, "inner_epochs": 2, "warmup_steps": 6}
DIVIDED = {"learner": {"shard_optimizer_state": True}}
LEARNED = {
    "lora": {},
    "full": {"policy": {"train": "full"}},
    "float16": {"policy": {"dtype": "float16"}},
}
EIGHT_BIT = {"policy": {"train": "full", "model": "tiny_animals"}, "learner": {"optimizer": "adamw_8bit"}}


def both_ways(tables: dict, changes: dict) -> tuple[Case, Case]:
    """Run the case with unsharded and with sharded optimizer state."""
    whole = with_changes(with_changes(tables, {"learner": TWO_RANKS}), changes)
    return Case(whole, rounds=2), Case(with_changes(whole, DIVIDED), rounds=2)


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return small_tables(tiny_model, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def outcomes(small: dict, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    cases = {}
    for name, changes in LEARNED.items():
        cases[name], cases[f"divided {name}"] = both_ways(small, changes)
    # Norms of 128 bytes and kernels of many thousand: buckets of several tensors, and of one that is larger.
    cases["divided in buckets"] = replace(cases["divided full"], bucket_bytes=600)
    cases["go_apart"] = Case(cases["divided lora"].tables, "go_apart")
    return run_in_ranks(cases, tmp_path_factory.mktemp("outcomes"))


def check_division(divided: list[Outcome], whole: list[Outcome]) -> None:
    """Weights are equal after every optimizer step, and each rank has half of the optimizer state."""
    assert divided[0].steps == divided[1].steps == whole[0].steps == whole[1].steps
    assert len(set(whole[0].steps)) == len(whole[0].steps) >= 4
    zero, one, undivided = divided[0].optimizer_state, divided[1].optimizer_state, whole[0].optimizer_state
    assert undivided.keys() == zero.keys() | one.keys() and not zero.keys() & one.keys()
    for place, moments in {**zero, **one}.items():
        assert np.array_equal(moments, undivided[place]), place
    held = [sum(moments.nbytes for moments in each.values()) for each in (zero, one)]
    print(f"rank 0 keeps {held[0]} bytes of moments, rank 1 {held[1]}")
    assert max(held) < 1.1 * sum(held) / 2


@pytest.mark.thorough
@pytest.mark.parametrize("name", LEARNED)
def test_sharded_optimizer_state_has_the_bits_of_unsharded_state(name: str, outcomes: Outcomes) -> None:
    check_division(outcomes[f"divided {name}"], outcomes[name])


@pytest.mark.thorough
def test_gradients_and_weights_sent_in_many_buckets_have_the_same_bits(outcomes: Outcomes) -> None:
    check_division(outcomes["divided in buckets"], outcomes["full"])


def test_a_bucket_has_as_many_tensors_in_their_order_as_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "BUCKET_BYTES", 40)
    tensors = [torch.zeros(count) for count in (4, 6, 1, 20, 3, 3)]
    buckets = [[tensor.numel() for tensor in bucket] for bucket in rank_group._buckets(tensors)]
    assert buckets == [[4, 6], [1], [20], [3, 3]]
    assert (rank_group.buffer_bytes(7, 2), rank_group.buffer_bytes(70, 2), rank_group.buffer_bytes(70, 1)) == (
        28,
        40,
        0,
    )


@pytest.mark.thorough
def test_a_rank_with_other_weights_is_found_before_the_broadcast(
    outcomes: Outcomes,
) -> None:
    for outcome in outcomes["go_apart"]:
        (error,) = outcome.errors
        assert "the weights of rank 1 of 2 are not those of rank 0" in error
        assert not outcome.steps, "before the first optimizer step ends"


@pytest.mark.eight_bit
def test_sharded_state_in_eight_bits_has_the_bits_of_unsharded_state(small: dict, tmp_path: Path) -> None:
    changes = with_changes(EIGHT_BIT, {"sampling": {"num_steps": 3}, "learner": {"micro_batch_size": 2}})
    whole, divided = both_ways(small, changes)
    found = run_in_ranks({"whole": whole, "divided": divided}, tmp_path)
    assert np.dtype("uint8") in {array.dtype for array in found["whole"][0].optimizer_state.values()}
    check_division(found["divided"], found["whole"])


@pytest.mark.eight_bit
def test_in_eight_bits_all_ranks_use_the_same_memory_format() -> None:
    settings = LearnerTable.model_validate(
        {**TWO_RANKS, "micro_batch_size": 1, "optimizer": "adamw_8bit", "shard_optimizer_state": True}
    )
    kernels = {
        str(number): torch.nn.Parameter(torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last))
        for number in range(4)
    }
    assert not any(kernel.is_contiguous() for kernel in kernels.values())
    optimizer = ShardedOptimizer(kernels, settings, ProcessGroup(1, 2))
    assert len(optimizer.owned) == 2 and all(kernel.is_contiguous() for kernel in kernels.values())


def test_parameters_are_divided_evenly_among_owners() -> None:
    assert owners_of([5, 9, 1, 4, 4], 2) == [1, 0, 1, 1, 0] and owners_of([3, 2], 1) == [0, 0]
    sizes = np.random.default_rng(0).integers(1, 1000, 200).tolist()
    for ranks in (2, 3, 8):
        held = np.bincount(owners_of(sizes, ranks), weights=sizes, minlength=ranks)
        assert held.sum() == sum(sizes) and held.max() <= sum(sizes) / ranks + max(sizes)


def test_fewer_parameters_than_ranks_are_refused() -> None:
    settings = LearnerTable.model_validate({**TWO_RANKS, "micro_batch_size": 1, "shard_optimizer_state": True})
    with pytest.raises(ValueError, match="learner.world_size is 2, and the network has 1 trained parameters"):
        ShardedOptimizer({"weight": torch.nn.Parameter(torch.zeros(3))}, settings, ProcessGroup(1, 2))

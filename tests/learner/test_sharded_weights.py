"""A learner whose weights are sharded over ranks learns what one rank learns, in a fraction of its memory."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.round_data.transitions import indices_of
from tests.conftest import small_tables
from tests.gradients import relative_error
from tests.rank_processes import Case, Outcome, chosen, learn, run_in_ranks, with_changes
from tests.tiny_families import MAKERS, policy_table, save_tiny_sd3

Outcomes = dict[str, list[Outcome]]
SHARDED = {"batch_size": 4, "shard_weights": True}
ONE_RANK = {"batch_size": 2, "gradient_accumulation_steps": 2, "world_size": 1}  # the same images an optimizer step
GROUPS = {"prompts": {"name": "animals", "images_per_prompt": 2}}
TWICE = {"learner": {"inner_epochs": 2}}
FULL = {"policy": {"train": "full"}}
THREE_STEPS = {"learner": {"micro_batch_size": 3}}  # of flow matching's four, one is deterministic
ONE_ROW = {"learner": {"micro_batch_size": 1}}  # in float64, all four steps are stochastic
pytestmark = pytest.mark.thorough  # processes of several ranks: a minute


def algorithm(name: str, **keys: object) -> dict:
    return {"algorithm": {"name": name, **keys}}


MASK = {"ratio": "proximal", "max_drift_nats": 0.03}
# Of each case, what is changed in the small recipe, and what else is to be said of it.
LEARNED: dict[str, tuple[dict, dict]] = {
    "double lora": (TWICE, {"rounds": 2}),
    "double full": ({**FULL, **TWICE}, {}),
    "double checkpointed": ({"policy": {"train": "full", "gradient_checkpointing": True}}, {}),
    "double offloaded": ({"learner": {"offload_weights": True}}, {"rounds": 2}),
    "double sd3": ({"policy": {"name": "sd3", "train": "full", "gradient_checkpointing": True}, **ONE_ROW}, {}),
    "double sd3 lora": ({"policy": {"name": "sd3"}, **ONE_ROW}, {}),
    "double grpo": ({**algorithm("grpo"), **GROUPS}, {}),
    "double rwr": (algorithm("rwr", noised_samples=4), {}),
    "double dpok": (algorithm("dpok", kl_coef=0.1), {}),
    "double mask": ({**algorithm("ddpo_is", clip_range=1e-3, off_policy=MASK), **TWICE}, {}),
    "double dropped": (TWICE, {"dropped": (2, 5, 6)}),
    "double lagging": ({**algorithm("diffusion_nft", noised_samples=4), **GROUPS, "max_policy_lag": 1}, {"rounds": 2}),
    "lora": (TWICE, {"rounds": 2}),
    "full bfloat16": ({"policy": {"train": "full", "dtype": "bfloat16"}}, {}),
    "evaluated": ({"evaluation": {"every": 1, "images": 2}, "learner": {"micro_batch_size": 4}}, {"rounds": 2}),
    "float16": ({"policy": {"dtype": "float16"}}, {"rounds": 2}),
    "flux": ({"policy": {"name": "flux"}, **THREE_STEPS}, {}),
    "wan": ({"policy": {"name": "wan"}, **THREE_STEPS}, {}),
    "wan bfloat16": ({"policy": {"name": "wan", "dtype": "bfloat16"}, **THREE_STEPS}, {}),
    "z_image": ({"policy": {"name": "z_image"}, **THREE_STEPS}, {}),
}
FOUR_RANKS = ("double lora", "double full", "double sd3", "double dpok", "double dropped")
LOOKED_AT = ((2, "double full"), (4, "double full"), (2, "lora"))  # by other tests too; the others take turns
LARGEST_ERROR = {"float16": 2e-2, "full bfloat16": 2e-2, "wan bfloat16": 2e-2}  # the others in float32: 1e-5


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return small_tables(tiny_model, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of each family's small model. Those for float64 have no layer that computes in float32."""
    sd3 = save_tiny_sd3(tmp_path_factory.mktemp("sd3"))
    change_transformer(sd3, qk_norm=None)  # diffusers computes RMS norms in float32
    return {"sd3": sd3, **{name: MAKERS[name](tmp_path_factory.mktemp(name)) for name in ("flux", "wan", "z_image")}}


def change_transformer(folder: Path, **keys: Any) -> None:
    """Replace a tiny SD3's transformer by one with other keys in its configuration."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    config: Any = dict(SD3Transformer2DModel.load_config(folder / "transformer")) | keys
    SD3Transformer2DModel.from_config(config).save_pretrained(folder / "transformer", safe_serialization=True)


def memory_cases(small: dict, folder: Path) -> dict[str, Case]:
    """Return learners of two ranks that train a transformer of eight blocks, with and without sharded weights."""
    deep = save_tiny_sd3(folder)
    change_transformer(deep, num_layers=8, attention_head_dim=32, caption_projection_dim=64)
    policy = policy_table("sd3", deep, train="full", gradient_checkpointing=True)
    cases = {}
    for sharded in (False, True):
        learner = {**SHARDED, "shard_weights": sharded, "world_size": 2, "micro_batch_size": 1}
        tables = {**with_changes(small, {"learner": learner}), "policy": policy}
        cases["memory sharded" if sharded else "memory whole"] = Case(tables, "measure_memory")
    return cases


def case_of(small: dict, families: dict[str, Path], name: str, learner: dict) -> Case:
    changes, more = LEARNED[name]
    tables = with_changes(with_changes(small, changes), {"learner": learner})
    if learner["world_size"] == 4:  # a rank has one image of four steps
        tables["learner"]["micro_batch_size"] = min(4, tables["learner"]["micro_batch_size"])
    family = tables["policy"]["name"]
    if family in families:
        others = {key: value for key, value in tables["policy"].items() if key not in ("name", "model")}
        tables = {**tables, "policy": policy_table(family, families[family], **others)}
    tables |= {"algorithm": changes["algorithm"]} if "algorithm" in changes else {}
    return Case(tables, double=name.startswith("double"), **more)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, small: dict, families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Outcomes]:
    """Run the cases of this turn in two and in four ranks, and return each rank's outcome."""
    of_turn = chosen(request, "count", "name").union(LOOKED_AT)
    found = {}
    for count in (2, 4):
        learner = {**SHARDED, "world_size": count}
        names = [name for name in LEARNED if (count, name) in of_turn]
        cases = {name: case_of(small, families, name, learner) for name in names}
        if count == 2:
            cases |= memory_cases(small, tmp_path_factory.mktemp("deep"))
            cases["meet_a_bad_trajectory"] = Case(cases["lora"].tables, "meet_a_bad_trajectory")
            cases["lose_one"] = Case(cases["lora"].tables, "lose_one")  # none comes after it
        found[count] = run_in_ranks(cases, tmp_path_factory.mktemp("outcomes"), count)
    return found


@pytest.fixture(scope="module")
def alone(small: dict, families: dict[str, Path]) -> Callable[[str], Outcome]:
    @functools.cache  # for two and for four ranks
    def learned(name: str) -> Outcome:
        return learn(case_of(small, families, name, _without_sharding(name)), ProcessGroup())

    return learned


def _without_sharding(name: str) -> dict:
    return {**ONE_RANK, "offload_weights": False}


BOTH = [
    pytest.param(*case, marks=() if case in LOOKED_AT else pytest.mark.rotated(every=2))
    for case in (*((2, name) for name in LEARNED), *((4, name) for name in FOUR_RANKS))
]


@pytest.mark.parametrize(("count", "name"), BOTH)
def test_all_ranks_gather_the_same_bits_after_every_optimizer_step(
    count: int, name: str, outcomes: dict[int, Outcomes]
) -> None:
    first, *others = outcomes[count][name]
    assert all(each.steps == first.steps for each in others)
    assert len(set(first.steps)) == len(first.steps) > 0


@pytest.mark.parametrize(("count", "name"), BOTH)
def test_sharded_ranks_learn_what_one_rank_learns(
    count: int, name: str, outcomes: dict[int, Outcomes], alone: Callable[[str], Outcome]
) -> None:
    several, one = outcomes[count][name][0], alone(name)
    assert len(several.steps) == len(one.steps)
    error = relative_error(several.weights, one.weights)
    print(f"{count} ranks, {name}: relative {error:.1e}")
    assert error < (1e-10 if name.startswith("double") else LARGEST_ERROR.get(name, 1e-5))
    compared = ("optimizer_steps", "optimizer_steps_skipped", "loss", "clip_fraction", "masked_fraction")
    for found, expected in zip(several.metrics, one.metrics, strict=True):
        assert found.keys() == expected.keys()
        for key in expected.keys() & set(compared) if name not in LARGEST_ERROR else ("optimizer_steps",):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6, nan_ok=True), key


def test_each_rank_keeps_its_part_of_the_optimizer_state(outcomes: dict[int, Outcomes]) -> None:
    for count in (2, 4):
        ranks = outcomes[count]["double full"]
        held = [sum(array.nbytes for array in each.optimizer_state.values()) for each in ranks]
        moments = {name: array for each in ranks for name, array in each.optimizer_state.items() if array.ndim}
        numbers = sum(array.size for array in moments.values())
        assert numbers == 2 * sum(array.size for array in ranks[0].weights.values()), "each number once"
        assert max(held) < 1.3 * sum(held) / count, "small parameters are not divisible evenly"


def test_a_rank_holds_half_and_gathers_the_whole_network_at_no_time(outcomes: dict[int, Outcomes]) -> None:
    whole, sharded = (outcomes[2][name][0].bytes for name in ("memory whole", "memory sharded"))
    print(f"of one rank without sharding: {whole}\nof one of two ranks that share: {sharded}")
    assert sharded["weights"] < 0.55 * whole["weights"]
    assert sharded["optimizer state"] < 0.55 * whole["optimizer state"]
    assert 0 < sharded["gathered"] < 0.3 * whole["weights"], "of eight blocks, two at most"
    assert whole["gathered"] == 0


def test_what_one_rank_finds_wrong_stops_both_and_leaves_them_as_they_were(outcomes: dict[int, Outcomes]) -> None:
    zero, one = outcomes[2]["meet_a_bad_trajectory"]
    assert (zero.errors, one.errors) == (["OtherRankFailed"], ["WeightsDidNotArrive"])
    calm = outcomes[2]["lora"][0]  # the same rounds with nothing wrong
    count = int(calm.metrics[0]["optimizer_steps"])
    assert count and zero.steps == one.steps == calm.steps[:count]


def test_a_rank_that_is_lost_in_a_pass_is_reported_by_the_others(outcomes: dict[int, Outcomes]) -> None:
    left, gone = outcomes[2]["lose_one"]
    assert not gone.errors and left.seconds < 30
    (error,) = left.errors
    assert error.startswith("rank 0 of 2 has lost the others")


@pytest.mark.parametrize("images", [[5], [5, 1], [5, 1, 4], [5, 1, 4, 2, 8]])
def test_even_shares_have_equal_lengths_and_own_rows_first(images: list[int]) -> None:
    indices = indices_of(torch.tensor(images), range(3))
    shares = [ProcessGroup(rank, 2).share_of_step(indices, even=True) for rank in range(2)]
    assert len({len(share) for share, _ in shares}) == 1
    own = torch.cat([share[:count] for share, count in shares])
    assert sorted(own.tolist()) == sorted(indices.tolist())
    assert all(np.isin(share[:, 0].numpy(), images).all() for share, _ in shares)

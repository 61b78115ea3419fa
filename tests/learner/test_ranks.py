"""A learner of two ranks, each a process: it learns what one alone learns, and both arrive at the same bits."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.common.policy_weights import pack
from ray_ddpo.common.schedule import transition_order
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.learner.call_names import title_of
from ray_ddpo.learner.process_group import ProcessGroup, process_groups
from ray_ddpo.learner.round_data.reference_passes import Update
from ray_ddpo.learner.round_data.transitions import RoundTransitions, indices_of, round_transitions
from tests.conftest import small_tables
from tests.gradients import relative_error
from tests.rank_processes import Case, Outcome, chosen, learn, run_in_ranks, with_changes
from tests.rounds import components_with, learner_of, sample_round

TWO_RANKS = {"batch_size": 4, "world_size": 2}
ONE_RANK = {"batch_size": 2, "gradient_accumulation_steps": 2, "world_size": 1}  # the same images an optimizer step
GROUPS = {"prompts": {"name": "animals", "images_per_prompt": 2}}
TWICE = {"learner": {"inner_epochs": 2}}


def _algorithm(name: str, **keys: object) -> dict:
    return {"algorithm": {"name": name, **keys}}


MASK = {"ratio": "proximal", "max_drift_nats": 0.03}
FIRST_STEP = tuple(sorted(transition_order(0, 0, 0, 8)[:4].tolist()))  # its images, at the recipe's seed
DOUBLE = {"double": True}
IN_FLOAT16 = (
    "optimizer_steps",
    "optimizer_steps_skipped",
    "learner/micro_batch_size",
)  # the others are rounded too far
pytestmark = pytest.mark.thorough  # two processes go through all cases: half a minute
# Of each case, what is changed in the small recipe, and what else is to be said of it.
LEARNED: dict[str, tuple[dict, dict]] = {
    "ddpo_is": (TWICE, {"rounds": 2}),
    "evaluated": ({"evaluation": {"every": 1, "images": 2}, "learner": {"micro_batch_size": 4}}, {"rounds": 2}),
    "full": ({"policy": {"train": "full"}, **TWICE}, {}),
    "grpo": ({**_algorithm("grpo", clip_range=1e-3), **GROUPS}, {"rounds": 2}),
    "grpo_guard": ({**_algorithm("grpo_guard", off_policy={"ratio": "proximal"}), **GROUPS, **TWICE}, {}),
    "flow_dppo": ({**_algorithm("flow_dppo", trust_region_nats=1e-3), **GROUPS}, {"rounds": 2}),
    "rwr": ({**_algorithm("rwr", noised_samples=4), **TWICE}, {}),
    "dpok": (_algorithm("dpok", kl_coef=0.1, clip_range=1e-3), {}),
    "value": ({**_algorithm("dpok", value={"learning_rate": 1e-2}), **TWICE}, {"rounds": 2, "dropped": (2, 5)}),
    "gardo": (
        {**_algorithm("gardo", gate=False, diversity=False, reset_rounds=1, clip_range=1e-3), **GROUPS},
        {"rounds": 2},
    ),
    "diffusion_nft": ({**_algorithm("diffusion_nft", noised_samples=4), **GROUPS, "max_policy_lag": 1}, {"rounds": 2}),
    "dpo": ({**_algorithm("dpo", noised_samples=4, beta=20.0), **GROUPS}, {"rounds": 2}),
    "dgpo": ({**_algorithm("dgpo", noised_samples=4, beta=20.0, kl_coef=0.01), **GROUPS, **TWICE}, {"rounds": 2}),
    "double dpo": ({**_algorithm("dpo", noised_samples=4, beta=20.0), **GROUPS, **TWICE}, DOUBLE),
    "awm": ({**_algorithm("awm", noised_samples=4, clip_range=0.01, shared_noise=True), **GROUPS, **TWICE}, {}),
    "draft": (
        {
            **_algorithm("draft"),
            "sampling": {"backprop_steps": [1, 3]},
            "reward": {"name": "colourfulness"},
            "learner": {"micro_batch_size": 2, "inner_epochs": 2},
        },
        {"rounds": 2},
    ),
    "mask": ({**_algorithm("ddpo_is", clip_range=1e-3, off_policy=MASK), **TWICE}, {}),
    "dropped": (TWICE, {"dropped": (2, 5, 6)}),
    "one image left": (_algorithm("ddpo_is", off_policy={"ratio": "proximal"}), {"dropped": FIRST_STEP[1:]}),
    "nothing left": ({}, {"dropped": FIRST_STEP}),
    "a budget of KL": ({"learner": {"inner_epochs": 4, "max_kl_nats": 1e-4}}, {}),
    "float16": ({"policy": {"dtype": "float16"}}, {"rounds": 2}),
    "double": (TWICE, DOUBLE),
    "double divided": ({"learner": {"inner_epochs": 2, "shard_optimizer_state": True}}, {**DOUBLE, "rounds": 2}),
    "double full": ({"policy": {"train": "full"}, **TWICE}, DOUBLE),
    "double grpo": ({**_algorithm("grpo"), **GROUPS}, DOUBLE),
    "double rwr": (_algorithm("rwr", noised_samples=4), DOUBLE),
    "double dpok": (_algorithm("dpok", kl_coef=0.1), DOUBLE),
    "double dropped": (TWICE, {**DOUBLE, "dropped": (2, 5, 6)}),
}
# Cases that other tests look at too; the others take turns.
LOOKED_AT = ("mask", "nothing left", "a budget of KL", "evaluated", "one image left")
CASES = [pytest.param(name, marks=() if name in LOOKED_AT else pytest.mark.rotated(every=2)) for name in LEARNED]
DEEDS = ("meet_a_bad_trajectory", "go_apart", "find_least_micro_batch", "lose_one")  # none comes after the last


def _case(tables: dict, name: str, learner: dict) -> Case:
    changes, more = LEARNED[name]
    algorithm = {"algorithm": changes["algorithm"]} if "algorithm" in changes else {}
    return Case(with_changes(with_changes(tables, changes), {"learner": learner}) | algorithm, **more)


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return small_tables(tiny_model, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, small: dict, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Outcome]]:
    """Run the cases of this turn in two ranks, and return each rank's outcome."""
    tables = with_changes(small, {"learner": TWO_RANKS})
    auto = with_changes(tables, {"learner": {"micro_batch_size": "auto"}})
    names = {name for (name,) in chosen(request, "name")}.union(LOOKED_AT)
    cases = {name: _case(small, name, TWO_RANKS) for name in LEARNED if name in names}
    cases |= {deed: Case(auto if deed == "find_least_micro_batch" else tables, deed) for deed in DEEDS}
    return run_in_ranks(cases, tmp_path_factory.mktemp("outcomes"))


@pytest.fixture(scope="module")
def alone(small: dict) -> Callable[[str], Outcome]:
    return lambda name: learn(_case(small, name, ONE_RANK), ProcessGroup())


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_have_the_same_bits_after_every_optimizer_step(
    name: str, outcomes: dict[str, list[Outcome]]
) -> None:
    first, second = outcomes[name]
    assert first.steps == second.steps and len(set(first.steps)) == len(first.steps) > 0
    assert first.metrics and all(
        _comparable(one) == pytest.approx(other, nan_ok=True)
        for one, other in zip(first.metrics, map(_comparable, second.metrics), strict=True)
    )


def _comparable(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("seconds/")}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_what_one_rank_learns_with_twice_the_accumulation(
    name: str, outcomes: dict[str, list[Outcome]], alone: Callable[[str], Outcome]
) -> None:
    """Weights and metrics agree up to the order of sums in float32, and exactly in float64."""
    two, one = outcomes[name][0], alone(name)
    assert len(two.steps) == len(one.steps)
    error = relative_error(two.weights, one.weights)
    largest = max(float(np.abs(two.weights[key] - value).max()) for key, value in one.weights.items())
    print(f"{name}: relative {error:.1e}, the farthest weight {largest:.1e}")
    assert error < (
        1e-10 if name.startswith("double") else 2e-2 if name == "float16" else 1e-5
    )  # twenty of float16's own steps
    for found, expected in zip(map(_comparable, two.metrics), map(_comparable, one.metrics), strict=True):
        assert found.keys() == expected.keys()
        for key in expected if name != "float16" else IN_FLOAT16:
            # A KL is a difference of log-probs, hardly more than their rounding, times the latents' elements.
            smallest = 2e-4 if key.startswith("kl_nats") else 1e-6
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=smallest, nan_ok=True), key
    if name != "float16":
        assert sorted(two.log_ratios) == pytest.approx(sorted(one.log_ratios), rel=1e-4, abs=1e-5)


def test_what_the_cases_are_for_has_happened_in_them(outcomes: dict[str, list[Outcome]]) -> None:
    assert 0 < outcomes["mask"][0].metrics[0]["masked_fraction"] < 1
    assert outcomes["nothing left"][0].metrics[0]["optimizer_steps_skipped"] == 1
    assert len(outcomes["a budget of KL"][0].steps) < 8
    assert "kl_reference_nats" in outcomes["evaluated"][0].metrics[0]
    assert outcomes["one image left"][0].metrics[0]["optimizer_steps_skipped"] == 0


def test_what_one_rank_finds_wrong_stops_both_and_leaves_them_as_they_were(
    outcomes: dict[str, list[Outcome]], small: dict
) -> None:
    zero, one = outcomes["meet_a_bad_trajectory"]
    assert (zero.errors, one.errors) == (["OtherRankFailed"], ["WeightsDidNotArrive"])
    calm = learn(Case(with_changes(small, {"learner": ONE_RANK})), ProcessGroup())
    assert zero.steps == one.steps and len(zero.steps) == 2
    assert zero.metrics[0]["loss"] == pytest.approx(calm.metrics[0]["loss"], abs=1e-6)


def test_ranks_whose_weights_diverge_are_named(outcomes: dict[str, list[Outcome]]) -> None:
    for outcome in outcomes["go_apart"]:
        (error,) = outcome.errors
        assert "the weights of rank 1 of 2 are not those of rank 0" in error
        assert len(outcome.steps) == 1, "at the first optimizer step"


def test_ranks_use_the_smallest_micro_batch_size_that_any_found(outcomes: dict[str, list[Outcome]]) -> None:
    assert [outcome.micro_batch_size for outcome in outcomes["find_least_micro_batch"]] == [2.0, 2.0]


def test_a_rank_whose_peer_is_gone_reports_it_and_does_not_wait_for_ever(outcomes: dict[str, list[Outcome]]) -> None:
    left, gone = outcomes["lose_one"]
    assert not gone.errors and left.seconds < 30
    (error,) = left.errors
    assert error.startswith("rank 0 of 2 has lost the others")


def test_a_rank_takes_every_other_image_with_all_of_its_steps() -> None:
    indices = indices_of(torch.tensor([7, 3, 9, 4]), range(2))
    assert ProcessGroup().share(indices) is indices
    assert ProcessGroup(0, 2).share(indices).tolist() == [[7, 0], [9, 0], [7, 1], [9, 1]]
    assert ProcessGroup(1, 2).share(indices).tolist() == [[3, 0], [4, 0], [3, 1], [4, 1]]
    assert [ProcessGroup(rank, 4).share(indices[:3]).tolist() for rank in (2, 3)] == [[[9, 0]], []]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_all_shares_together_are_the_optimizer_step(count: int) -> None:
    indices = indices_of(torch.tensor([5, 1, 4, 2]), range(3))
    shares = [ProcessGroup(rank, count).share(indices) for rank in range(count)]
    assert sorted(torch.cat(shares).tolist()) == sorted(indices.tolist())
    assert max(map(len, shares)) - min(map(len, shares)) <= 3, "one image more, at the most"


@pytest.fixture(scope="module")
def transitions(small: dict) -> RoundTransitions:
    components = components_with(small)
    sampled = sample_round(components, learner_of(components).weights()[-1])
    return round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu")


def _asked(items: RoundTransitions, epochs: list, share: tuple[int, int], own_pass_will_do: bool) -> list:
    weights = pack(0, {"weight": np.zeros(1, np.float32)})
    tensors = [[torch.tensor(step) for step in epoch] for epoch in epochs]
    steps = Update(items, tensors, weights, weights, ProcessGroup(*share)).steps(own_pass_will_do)
    return [[tuple(index) for index in step.tolist()] for step in steps]


def test_references_are_of_a_ranks_share_but_for_the_first_step_of_all_ranks(
    transitions: RoundTransitions,
) -> None:
    """A rank without a transition in the first step precomputes those of the second: the policy changes before it."""
    epochs = [[[(0, 0)], [(1, 0), (2, 0)], [(3, 0)]]]
    assert _asked(transitions, epochs, (1, 2), own_pass_will_do=True) == [[(2, 0)]]
    assert _asked(transitions, epochs, (0, 2), own_pass_will_do=True) == [[(1, 0)], [(3, 0)]]
    assert _asked(transitions, epochs, (0, 2), own_pass_will_do=False) == [[(0, 0)], [(1, 0)], [(3, 0)]]


def test_transitions_of_another_rank_in_the_first_epoch_have_references_too(transitions: RoundTransitions) -> None:
    epochs = [[[(0, 0), (1, 0)], [(2, 0), (3, 0)]], [[(1, 0), (2, 0)], [(0, 0), (3, 0)]]]
    assert _asked(transitions, epochs, (0, 2), own_pass_will_do=True) == [[(0, 0)], [(2, 0)], [(1, 0)]]
    assert _asked(transitions, epochs, (0, 1), own_pass_will_do=True) == epochs[0]


def test_ranks_have_different_names_on_the_dashboard(small: dict) -> None:
    components = components_with(small)
    assert repr(learner_of(components, ProcessGroup(1, 2))).startswith("Learner rank 1 of 2, of ")
    assert repr(learner_of(components)).startswith("Learner of ")
    batch = TrainBatch(3, (), np.zeros(0))
    assert title_of(batch, 1, 2) == "Learner rank 1 of 2: learn from round 3"
    assert title_of(batch) == "Learner: learn from round 3"


def test_a_recipe_decides_the_world_size_and_whether_ranks_share_gpus(small: dict) -> None:
    for num_gpus, own in ((0.5, False), (0.6, True), (1, True)):
        learner = {**TWO_RANKS, "num_gpus": num_gpus}
        ranks = process_groups(components_with(with_changes(small, {"learner": learner})).recipe)
        assert [str(each) for each in ranks] == ["rank 0 of 2", "rank 1 of 2"]
        assert {each._own_gpu for each in ranks} == {own}


def test_a_single_rank_has_no_process_group_and_returns_its_input() -> None:
    ranks, values = ProcessGroup(), torch.tensor([1.0, 2.0])
    assert (ranks.all_reduce_sum(3), ranks.all_reduce_max(2), ranks.all_reduce_min(5)) == (3, 2, 5)
    assert ranks.all_gather(values).tolist() == [1.0, 2.0] and ranks.all_gather(None) is None
    with ranks.raise_on_all_ranks():
        assert not torch.distributed.is_initialized()
    assert math.isnan(ranks.all_reduce_sum(math.nan))

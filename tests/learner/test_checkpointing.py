"""Gradient checkpointing "auto": off where micro-batches fit without it, kept over a resume, and of the same bits."""

import dataclasses
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import ray_ddpo.learner.optimization.micro_batch as module
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.commands.plan.numbers import plan_of
from ray_ddpo.deploy.commands.plan.plan import largest_micro_batch, plan, recomputes
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.optimization.checkpointing import LEAST, use_checkpointing
from ray_ddpo.learner.process_group import ProcessGroup
from tests.accepted_page import assert_refused
from tests.deploy.manifests import ROOT
from tests.rounds import components_with, learner_of, sample_round

Memory = namedtuple("Memory", "available")
AUTO = {"policy__gradient_checkpointing": "auto", "learner__micro_batch_size": "auto"}


def of_size(monkeypatch: pytest.MonkeyPatch, components: Components, transitions: float, recomputed: bool) -> None:
    """Leave memory for an optimizer step with as many transitions."""
    policy = components.policy.with_checkpointing(recomputed)
    line = policy.sizes(components.recipe.sampling, "cpu").learner
    available = (line.fixed + transitions * line.each) / 0.9
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: Memory(available))


def is_on(learner: Learner) -> bool:
    return learner._policy.network.is_gradient_checkpointing


@pytest.mark.rotated(every=2, group="longest")
def test_it_is_off_where_the_micro_batches_fit_and_on_where_they_do_not(
    tables: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    components = components_with(tables, **AUTO)
    of_size(monkeypatch, components, LEAST + 0.5, recomputed=False)
    learner = learner_of(components)
    assert not is_on(learner) and learner.state().recomputes is False
    assert learner.state().micro_batch_size == LEAST
    assert "policy.gradient_checkpointing: off, its activations fit" in capsys.readouterr().out
    of_size(monkeypatch, components, LEAST - 0.5, recomputed=False)
    learner = learner_of(components)
    assert is_on(learner) and learner.state().recomputes is True
    assert learner.state().micro_batch_size >= LEAST
    assert "policy.gradient_checkpointing: on, to save memory" in capsys.readouterr().out


def test_a_given_micro_batch_size_decides(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    components = components_with(tables, **(AUTO | {"learner__micro_batch_size": 2}))
    of_size(monkeypatch, components, 2.5, recomputed=False)
    assert not is_on(learner_of(components))
    of_size(monkeypatch, components, 1.5, recomputed=False)
    assert is_on(learner_of(components)) and learner_of(components).state().micro_batch_size == 2


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_is_learned_to_the_same_bits_either_way(
    dtype: str, tables: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = components_with(tables, **(AUTO | {"learner__micro_batch_size": 4, "policy__dtype": dtype}))
    learners = []
    for transitions in (4.5, 3.5):
        of_size(monkeypatch, components, transitions, recomputed=False)
        learners.append(learner_of(components))
    assert [is_on(each) for each in learners] == [False, True]
    sampled = sample_round(components, learners[0].weights()[-1])
    states = [each.update(sampled.batch, *sampled.trajectories)[1] for each in learners]
    assert states[0].trained.fingerprint == states[1].trained.fingerprint


def test_a_resumed_learner_keeps_the_choice(tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components = components_with(tables, **AUTO)
    of_size(monkeypatch, components, LEAST - 0.5, recomputed=False)
    before = learner_of(components)
    of_size(monkeypatch, components, 100, recomputed=False)
    after = learner_of(components)
    assert is_on(before) and not is_on(after)
    saved = save_checkpoint(Storage(tmp_path), Checkpoint(0, before.state(), {}), keep=1)
    after.load_state(load_checkpoint(saved).learner)
    assert is_on(after) and after.state().recomputes is True
    assert after.state().micro_batch_size == before.state().micro_batch_size
    after.load_state(dataclasses.replace(before.state(), recomputes=None))  # of an older checkpoint
    assert is_on(after)


def test_ranks_recompute_together(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has too little memory would otherwise find another micro-batch size than the one that all use."""
    components = components_with(tables, **AUTO)
    of_size(monkeypatch, components, 100, recomputed=False)

    class WithAnotherRank(ProcessGroup):
        def join(self, rendezvous: str, device: str) -> None:
            pass

        def all_reduce_max(self, number: float | int) -> float | int:
            return max(number, 1)

    learner = learner_of(components, WithAnotherRank())
    assert not is_on(learner)
    learner.join("")
    assert is_on(learner)


def test_graphs_end_where_activations_are_recomputed(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    components = components_with(tables, **AUTO)
    of_size(monkeypatch, components, 100, recomputed=False)
    learner = learner_of(components)
    learner._policy.record_graphs()  # pyright: ignore[reportCallIssue]
    learner.load_state(dataclasses.replace(learner.state(), recomputes=True))
    assert learner._policy.graphed is None


def test_a_network_that_cannot_recompute_is_refused(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    components = components_with(tables, **AUTO)
    load = type(components.policy).load

    def without(self: object, *arguments: object) -> object:
        policy = load(self, *arguments)  # pyright: ignore[reportArgumentType]
        policy.network = torch.nn.Linear(2, 2)
        return policy

    monkeypatch.setattr(type(components.policy), "load", without)
    with pytest.raises(ValueError, match="Linear cannot re-compute") as error:
        Learner(components.policy, components.algorithm, components.recipe)
    assert_refused('`policy.gradient_checkpointing = "auto"` for a network that cannot re-compute', str(error.value))


def test_checkpointing_is_turned_on_and_off() -> None:
    class Network:
        calls: list[str] = []

        def enable_gradient_checkpointing(self) -> None:
            self.calls.append("on")

        def disable_gradient_checkpointing(self) -> None:
            self.calls.append("off")

    for on in (True, False):
        use_checkpointing(Network(), on)
    assert Network.calls == ["on", "off"]


@pytest.mark.thorough
def test_the_plan_prints_what_is_chosen_on_gpus_of_each_size() -> None:
    tables = Recipe.load(ROOT / "deploy" / "recipes" / "sd15_aesthetic.toml").model_dump()
    tables["policy"] |= {"gradient_checkpointing": "auto"}
    tables["learner"] |= {"micro_batch_size": "auto"}
    recipe = Recipe.parse(tables)
    numbers, text = plan_of(recipe), plan(recipe)
    assert numbers.plain_learner is not None
    assert numbers.plain_learner.each > 2 * numbers.sizes.learner.each
    assert [recomputes(recipe, numbers, size) for size in (4, 80)] == [True, False]
    off = numbers.plain_learner.largest(0.9 * (80 * 2**30 - 600e6))
    assert LEAST <= largest_micro_batch(numbers, 80) <= off
    assert "gradient checkpointing" in text and "re-computes activations" in text

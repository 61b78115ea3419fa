"""Run learners of several ranks as processes of this machine, one case after the other, and return their results."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pytest
import torch
import torch.distributed as distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.policy_weights import fingerprint
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner import process_group as rank_group
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.process_group import BUCKET_BYTES, OtherRankFailed, ProcessGroup, RankLost, Rendezvous
from ray_ddpo.learner.sharding.layout import shards_weights
from ray_ddpo.learner.weight_check import WeightsDidNotArrive
from tests.double_policy import Double
from tests.rounds import SampledRound, components_with, learner_of, moved, sample_round

LONGEST_SECONDS = 900.0
KILLED = 9


@dataclass(frozen=True)
class Case:
    """A recipe's tables, and the work of a learner of that recipe."""

    tables: dict[str, Any]
    deed: str = "learn"
    rounds: int = 1
    dropped: tuple[int, ...] = ()
    double: bool = False
    bucket_bytes: int = BUCKET_BYTES


@dataclass
class Outcome:
    """The results of one rank."""

    metrics: list[dict[str, float]] = field(default_factory=list)  # a round each
    steps: list[str] = field(default_factory=list)  # the weights after every optimizer step, as fingerprints
    errors: list[str] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    micro_batch_size: float = 0.0
    seconds: float = 0.0
    bytes: dict[str, int] = field(default_factory=dict)  # that the rank holds, and allocates at the peak
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # at the end, as they were trained
    optimizer_state: dict[str, np.ndarray] = field(default_factory=dict)  # at the end, those that this rank keeps


def with_changes(tables: dict, changes: dict) -> dict:
    """Return the tables with the changed keys of `changes`."""
    for key, value in changes.items():
        tables = {**tables, key: {**tables.get(key, {}), **value} if isinstance(value, dict) else value}
    return tables


def components_of_case(case: Case) -> Components:
    """Return the case's components, with a float64 policy if the case asks for one."""
    components = components_with(case.tables)
    given, family = components.policy, components.recipe.policy.name
    checkpointing = given.gradient_checkpointing
    policy = Double(model=given.model, train=given.train, gradient_checkpointing=checkpointing, family=family)
    return dataclasses.replace(components, policy=policy) if case.double else components


def watched(learner: Learner, outcome: Outcome) -> Learner:
    """Return the learner with a hook that records its weights after every optimizer step."""
    parameters = learner._parameters

    def note(*_: object) -> None:
        if learner._shards_weights:
            outcome.steps.append(learner._weights.read(0).fingerprint)
            return
        arrays = {name: value.detach().numpy() for name, value in parameters.items()}
        outcome.steps.append(fingerprint(np.concatenate([array.ravel() for array in arrays.values()]), ()))

    learner._optimizer.register_step_post_hook(note)
    return learner


def sampled_for(learner: Learner, components: Components, round_index: int, dropped: tuple[int, ...]) -> SampledRound:
    """Return a round as the algorithm sees it, equal on every rank."""
    sampled = sample_round(components, learner.weights()[0 if components.recipe.max_policy_lag else -1], round_index)
    rewards = np.random.default_rng(round_index).normal(size=len(sampled.batch.advantages))
    prompts = [prompt.text for report in sampled.batch.reports for prompt in report.task.prompts]
    _, advantages = components.algorithm.compute_advantages(
        {}, prompts, rewards, components.recipe.prompts.images_per_prompt
    )
    advantages = components.algorithm.from_advantages(advantages)
    advantages[list(dropped)] = np.nan
    batch = dataclasses.replace(sampled.batch, advantages=advantages, dropped=dropped)
    return SampledRound(batch, sampled.trajectories)


def started(components: Components, process_group: ProcessGroup, rendezvous: str) -> Learner:
    """Return a learner with non-zero adapters that has joined the others."""
    if not shards_weights(components.recipe.learner):
        learner = learner_of(components, process_group)
        if process_group.world_size > 1:
            learner.join(rendezvous)
        return learner
    learner = Learner(components.policy, components.algorithm, components.recipe, process_group)
    learner.join(rendezvous)
    learner.load_state(LearnerState(0, (moved(learner.weights()[-1]),), {}, {}))
    return learner


def whole(parameter: torch.Tensor) -> np.ndarray:
    """Return a parameter, gathered if it is sharded."""
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).numpy().copy()


def learn(case: Case, process_group: ProcessGroup, rendezvous: str = "") -> Outcome:
    """Rounds as a run has them. One alone needs no rendezvous."""
    outcome, components = Outcome(), components_of_case(case)
    learner = watched(started(components, process_group, rendezvous), outcome)
    for round_index in range(case.rounds):
        sampled = sampled_for(learner, components, round_index, case.dropped)
        metrics, state = learner.update(sampled.batch, *sampled.trajectories)
        outcome.metrics.append(metrics)
        outcome.micro_batch_size = float(state.micro_batch_size or 0)
        outcome.optimizer_state = state.optimizer
    outcome.log_ratios = learner.log_ratios().tolist()
    parameters = trained_parameters(learner._policy.network).items()
    outcome.weights = {name: whole(value) for name, value in parameters}
    return outcome


def joined(case: Case, process_group: ProcessGroup, rendezvous: str) -> tuple[Outcome, Learner, SampledRound]:
    """Return a learner that has joined the others, and its first round."""
    outcome, components = Outcome(), components_of_case(case)
    learner = watched(started(components, process_group, rendezvous), outcome)
    return outcome, learner, sampled_for(learner, components, 0, ())


def meet_a_bad_trajectory(case: Case, process_group: ProcessGroup, rendezvous: str) -> Outcome:
    """What one rank alone can see is wrong with it; then the same round as it should be."""
    outcome, learner, sampled = joined(case, process_group, rendezvous)
    bad = sampled.trajectories
    if process_group.rank == 1:
        bad = tuple(dataclasses.replace(each, log_probs=each.log_probs + 1) for each in bad)
    try:
        learner.update(sampled.batch, *bad)
    except (WeightsDidNotArrive, OtherRankFailed) as error:
        outcome.errors.append(type(error).__name__)
    outcome.metrics.append(learner.update(sampled.batch, *sampled.trajectories)[0])
    return outcome


def go_apart(case: Case, process_group: ProcessGroup, rendezvous: str) -> Outcome:
    """One rank's weights are moved, as a GPU that computes wrongly would move them."""
    outcome, learner, sampled = joined(case, process_group, rendezvous)
    if process_group.rank == 1:
        with torch.no_grad():
            next(iter(learner._parameters.values())).view(-1)[0] += 1e-3
    try:
        learner.update(sampled.batch, *sampled.trajectories)
    except RuntimeError as error:
        outcome.errors.append(str(error))
    return outcome


def find_least_micro_batch(case: Case, process_group: ProcessGroup, rendezvous: str) -> Outcome:
    """One rank's device holds less than the other's."""
    outcome, components = Outcome(), components_of_case(case)
    learner = learner_of(components, process_group)
    if process_group.rank == 1:
        learner._use_micro_batch_size(2)
    learner.join(rendezvous)
    outcome.micro_batch_size = float(learner.state().micro_batch_size or 0)
    return outcome


def gathered_bytes(network: torch.nn.Module) -> int:
    """Return the bytes of all parameters that are gathered now."""
    states = [module._get_fsdp_state() for module in network.modules() if isinstance(module, FSDPModule)]
    parameters = [each for state in states for group in state._fsdp_param_groups for each in group.fsdp_params]
    return sum(output.untyped_storage().nbytes() for each in parameters for output in each.all_gather_outputs)


def measure_memory(case: Case, process_group: ProcessGroup, rendezvous: str) -> Outcome:
    """Count what the rank holds, and what is gathered whenever a layer computes, also for re-computed activations."""
    outcome, learner, sampled = joined(case, process_group, rendezvous)
    network, gathered = learner._policy.network, [0]
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda *_: gathered.append(gathered_bytes(network)))
    _, state = learner.update(sampled.batch, *sampled.trajectories)
    held = [each.to_local() if isinstance(each, DTensor) else each for each in network.parameters()]
    outcome.bytes = {
        "weights": sum(each.nbytes for each in held),
        "optimizer state": sum(array.nbytes for array in state.optimizer.values()),
        "gathered": max(gathered),
    }
    return outcome


def lose_one(case: Case, process_group: ProcessGroup, rendezvous: str) -> Outcome:
    """One rank's process ends in the middle of it all."""
    outcome, learner, sampled = joined(case, process_group, rendezvous)
    if process_group.rank == 1:
        os._exit(KILLED)
    started = time.monotonic()
    try:
        learner.update(sampled.batch, *sampled.trajectories)
    except RankLost as error:
        outcome.errors.append(str(error))
    outcome.seconds = time.monotonic() - started
    return outcome


DEEDS: dict[str, Callable[[Case, ProcessGroup, str], Outcome]] = {
    each.__name__: each
    for each in (learn, meet_a_bad_trajectory, go_apart, find_least_micro_batch, measure_memory, lose_one)
}


def chosen(request: pytest.FixtureRequest, *parameters: str) -> set[tuple[Any, ...]]:
    """Return the values of these parameters in the cases of the module that run now, in this turn."""
    cases = [item.callspec.params for item in request.session.items if item.path == request.path and _has_cases(item)]
    return {tuple(case[name] for name in parameters) for case in cases if case.keys() >= set(parameters)}


def _has_cases(item: pytest.Item) -> TypeGuard[pytest.Function]:
    return hasattr(item, "callspec")


def run_in_ranks(cases: dict[str, Case], folder: Path, count: int = 2) -> dict[str, list[Outcome]]:
    """What each rank arrives at in each case, in processes that do one case after the other."""
    rendezvous = {name: Rendezvous("127.0.0.1") for name in cases}
    inputs = {name: (dataclasses.asdict(case), rendezvous[name].address) for name, case in cases.items()}
    (folder / "cases.json").write_text(json.dumps(inputs))
    command = [sys.executable, "-m", "tests.rank_processes", str(folder), str(count)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(count)]
    try:
        for process in processes:
            process.wait(timeout=LONGEST_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {name: [_read(folder, name, rank) for rank in range(count)] for name in cases}


def _written(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name.replace(' ', '-')}-{rank}"


def _read(folder: Path, name: str, rank: int) -> Outcome:
    file = _written(folder, name, rank)
    if not file.with_suffix(".json").exists():
        return Outcome()  # it did not live to tell
    outcome = Outcome(**json.loads(file.with_suffix(".json").read_text()))
    with np.load(file.with_suffix(".npz")) as arrays:
        outcome.weights = dict(arrays)
    with np.load(file.with_suffix(".optimizer_state.npz")) as arrays:
        outcome.optimizer_state = dict(arrays)
    return outcome


def main(folder: Path, count: int, rank: int) -> None:
    """Run one rank's process."""
    torch.set_num_threads(1)
    for name, (inputs, rendezvous) in json.loads((folder / "cases.json").read_text()).items():
        case = Case(**{**inputs, "dropped": tuple(inputs["dropped"])})
        rank_group.BUCKET_BYTES = case.bucket_bytes
        outcome = DEEDS[case.deed](case, ProcessGroup(rank, count, timeout_seconds=60), rendezvous)
        distributed.destroy_process_group()
        file = _written(folder, name, rank)
        np.savez(file.with_suffix(".npz"), **outcome.weights)
        np.savez(file.with_suffix(".optimizer_state.npz"), **outcome.optimizer_state)
        outcome.weights, outcome.optimizer_state = {}, {}
        file.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

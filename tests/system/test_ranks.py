"""A learner of two ranks on Ray: equal bits after any death, and one rank's weights within rounding."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from ray_ddpo.common.diffusion.trained_weights import stored_weights
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import at_round, beside, in_turn, processes_of, title_of, wait_until

ROUNDS = 6


def recipe_of(tables: dict, name: str, ranks: int = 2, divided: bool = False, **changes: object) -> Recipe:
    learner = {**tables["learner"], "world_size": ranks, "shard_optimizer_state": divided}
    return Recipe.parse({**tables, "rounds": ROUNDS, "max_policy_lag": 1, "name": name, "learner": learner, **changes})


def trained(recipe: Recipe) -> PolicyWeights:
    """The weights in a run's last checkpoint."""
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None
    return load_checkpoint(newest).learner.trained


def metrics_of(recipe: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(recipe.run_path()) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def calm(tables: dict, cluster: None) -> str:
    return final_fingerprint(recipe_of(tables, "calm"))


@pytest.mark.system
def test_two_ranks_match_one_rank_and_give_the_same_bits_after_kills(tables: dict, cluster: None, calm: str) -> None:
    killed, one = recipe_of(tables, "killed", divided=True), recipe_of(tables, "one", ranks=1)
    run, deaths = Path(killed.run_path()), []

    def kill(place: int) -> None:
        processes = processes_of("ray::Learner")
        assert len(processes) == 2
        deaths.append(processes[place].pid)
        os.kill(processes[place].pid, signal.SIGKILL)

    with beside(in_turn(at_round(run, 2, lambda: kill(1)), at_round(run, 4, lambda: kill(0)))):
        assert final_fingerprint(killed) == calm
    assert len(set(deaths)) == 2
    assert sum(metrics.get("actor_restarts/learner", 0) for metrics in metrics_of(killed)) == 2, "one death each time"
    assert final_fingerprint(one) != calm, "the number of ranks is part of what decides the last bits"
    difference = float(np.abs(trained(one).buffer - trained(killed).buffer).max())
    print(f"\nfarthest from one rank after {ROUNDS} rounds: {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_two_ranks_resume_to_the_same_bits_with_or_without_sharded_optimizer_state(
    tables: dict, cluster: None, calm: str
) -> None:
    checkpoint = {"every": 1, "keep": 2}
    run_training(recipe_of(tables, "parts", checkpoint=checkpoint, rounds=2, divided=True))
    assert final_fingerprint(recipe_of(tables, "parts", checkpoint=checkpoint), resume=True) == calm
    assert final_fingerprint(recipe_of(tables, "whole", checkpoint=checkpoint, rounds=2)) != calm
    assert final_fingerprint(recipe_of(tables, "whole", checkpoint=checkpoint, divided=True), resume=True) == calm


@pytest.mark.thorough
def test_a_rank_that_dies_between_the_parts_of_a_round_changes_no_bit(tables: dict, cluster: None) -> None:
    learner = {**tables["learner"], "world_size": 2, "shard_optimizer_state": True, "parts_per_round": 2}
    calm, killed = (
        Recipe.parse({**tables, "rounds": ROUNDS, "max_policy_lag": 1, "name": name, "learner": learner})
        for name in ("calm", "killed")
    )
    run, died = Path(killed.run_path()), []

    def learning_from_a_first_part() -> list[psutil.Process]:
        """Ray writes what an actor does into its process's name."""
        return [process for process in processes_of("ray::Learner rank") if ", part 0" in title_of(process)]

    def kill() -> None:
        wait_until(lambda: bool(learning_from_a_first_part()), "a first part", 60)
        died.append(learning_from_a_first_part()[0].pid)
        os.kill(died[0], signal.SIGKILL)

    with beside(at_round(run, 2, kill)):
        assert final_fingerprint(killed) == final_fingerprint(calm)
    assert len(died) == 1
    assert sum(metrics.get("actor_restarts/learner", 0) for metrics in metrics_of(killed)) == 1


@pytest.mark.thorough
def test_another_number_of_ranks_is_another_run(tables: dict, cluster: None) -> None:
    recipe = recipe_of(tables, "other", rounds=1)
    run_training(recipe)
    with pytest.raises(ValueError, match="learner.world_size was 2 and is 1"):
        run_training(recipe_of(tables, "other", ranks=1), resume=True)


@pytest.mark.system
def test_a_role_larger_than_the_cluster_is_refused_at_once(tables: dict, cluster: None) -> None:
    learner = {**tables["learner"], "world_size": 2, "num_cpus": 5}
    with pytest.raises(ValueError, match="learner: its 2 ranks ask for CPU 10, and the whole cluster has CPU"):
        run_training(Recipe.parse({**tables, "name": "large", "learner": learner}))


def sharded_recipe(tables: dict, name: str, **changes: object) -> Recipe:
    learner = {**tables["learner"], "world_size": 2, "shard_weights": True}
    keys = {"rounds": 4, "max_policy_lag": 1, "name": name, "learner": learner, **changes}
    return Recipe.parse({**tables, **keys})


@pytest.mark.system
def test_ranks_with_sharded_weights_give_the_same_bits_after_a_kill_and_after_resume(
    tables: dict, cluster: None
) -> None:
    calm, killed, one = (
        sharded_recipe(tables, "calm"),
        sharded_recipe(tables, "killed", checkpoint={"every": 1, "keep": 2}, rounds=3),
        recipe_of(tables, "one", ranks=1).model_copy(update={"rounds": 4}),
    )
    run, died = Path(killed.run_path()), []

    def kill() -> None:
        processes = processes_of("ray::Learner")
        assert len(processes) == 2
        died.append(processes[1].pid)
        os.kill(processes[1].pid, signal.SIGKILL)

    with beside(at_round(run, 2, kill)):
        run_training(killed)
    assert len(died) == 1 and sum(each.get("actor_restarts/learner", 0) for each in metrics_of(killed)) == 1
    resumed = sharded_recipe(tables, "killed", checkpoint={"every": 1, "keep": 2})
    assert final_fingerprint(resumed, resume=True) == final_fingerprint(calm)
    final_fingerprint(one)
    assert float(np.abs(trained(one).buffer - trained(calm).buffer).max()) < 1e-5
    assert stored_weights(Path(calm.run_path()), trained(calm).manifest, 4).fingerprint == trained(calm).fingerprint

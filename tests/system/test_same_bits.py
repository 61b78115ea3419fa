"""The fingerprint table: a disturbed run ends with the weights of an undisturbed run in one process."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import tomli_w
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder, without_none
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.commands.scale import scale
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import (
    at_round,
    beside,
    in_turn,
    kill_a_worker_each_round,
    loaded,
    processes_of,
    rounds_done,
    wait_until,
    while_held,
)
from tests.system.drivers import Driver, committed_fingerprint, wait_until_gone
from tests.system.nodes import free_port, local_nodes, spilled_bytes

ROOT = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("DDPO_TEST_ROUNDS", "6"))  # `make same-bits` has 12, those of the published table
# `DDPO_TEST_DEVICE=cuda` makes the table on a GPU, which all roles share.
DEVICE = os.environ.get("DDPO_TEST_DEVICE", "cpu")
SHARE = {"num_gpus": 0.1} if DEVICE == "cuda" else {}
GRACE_SECONDS = 20.0  # from SIGTERM to the end of the process, on a machine busy with other things
TABLE: list[tuple[int, str, str]] = []
CALM: dict[str, str] = {}  # fingerprint of a recipe in one process, which many scenarios are held against

Scenario = Callable[[dict], str]


@pytest.fixture(scope="module", autouse=True)
def table(pytestconfig: pytest.Config):
    """Print what was found, scenario by scenario, when all are through."""
    TABLE.clear()
    yield
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n\n| lag | what befell the run | fingerprint |\n|---|---|---|")
        print("\n".join(f"| {lag} | {what} | {fingerprint[:16]} |" for lag, what, fingerprint in sorted(TABLE)))


@pytest.fixture
def calm(tables: dict) -> Callable[[int], dict]:
    """The recipe of the table at a lag, four tasks a round."""

    def at_lag(lag: int) -> dict:
        sampling = {**tables["sampling"], "batches_per_round": 4}
        learner = {**tables["learner"], **SHARE}
        changes = {"rounds": ROUNDS, "max_policy_lag": lag, "checkpoint": {"every": 3}, "runtime": {"device": DEVICE}}
        return {**tables, **changes, "sampling": sampling, "learner": learner}

    return at_lag


def recipe_of(tables: dict, name: str, samplers: int = 1, reward_workers: int = 1) -> Recipe:
    roles = {"samplers": {"count": samplers, **SHARE}, "reward_workers": {"count": reward_workers, **SHARE}}
    return Recipe.parse({**tables, "name": name, **roles})


def calm_fingerprint(tables: dict) -> str:
    """Of a calm run in one process; what decides its weights is run once."""
    key = json.dumps({**tables, "output_dir": ""}, sort_keys=True)
    if key not in CALM:
        CALM[key] = final_fingerprint(Recipe.parse({**tables, "name": "serial"}), serial=True)
    return CALM[key]


def samplers(count: int) -> Scenario:
    return lambda tables: final_fingerprint(recipe_of(tables, f"calm{count}", count, 1 + count % 2))


def scaled(tables: dict) -> str:
    recipe = recipe_of(tables, "scaled")
    run = Path(recipe.run_path())

    def scaled_to(samplers: int, reward_workers: int) -> Callable[[], None]:
        return while_held(
            "ray::Learner",
            lambda: scale(str(run), {"samplers": samplers, "reward_workers": reward_workers}),
            lambda: (loaded("ray::Sampler"), loaded("ray::RewardWorker")) == (samplers, reward_workers),
        )

    with beside(in_turn(at_round(run, 1, scaled_to(4, 1)), at_round(run, 3, scaled_to(2, 2)))):
        return final_fingerprint(recipe)


def killed(tables: dict) -> str:
    """With evaluations beside it, which the calm run has none of."""
    evaluation = {"every": 3, "images": 8, "batch_size": 4, "scorers": [{"name": "brightness"}]}
    recipe, kills = recipe_of({**tables, "evaluation": evaluation}, "killed", 2, 2), []
    with beside(kill_a_worker_each_round(Path(recipe.run_path()), kills)):
        fingerprint = final_fingerprint(recipe)
    assert len(kills) >= ROUNDS - 2, kills
    figures = EvalLog(Storage(recipe.run_path())).entries()
    assert [each["policy_version"] for each in figures] == list(range(0, ROUNDS + 1, 3))
    return fingerprint


def learner_killed(tables: dict) -> str:
    recipe = recipe_of(tables, "learner")
    (run, pids) = Path(recipe.run_path()), []

    def kill() -> None:
        (learner,) = processes_of("ray::Learner")
        pids.append(learner.pid)
        os.kill(learner.pid, signal.SIGKILL)

    with beside(in_turn(at_round(run, 1, kill), at_round(run, 4, kill))):
        fingerprint = final_fingerprint(recipe)
    assert len(set(pids)) == 2
    return fingerprint


def driver_signalled(number: signal.Signals) -> Scenario:
    """The signal comes in the middle of the run; then a second start goes on. Nothing may be left of either."""

    def scenario(tables: dict) -> str:
        recipe = recipe_of(tables, f"driver{number}", 2)
        run = Path(recipe.run_path())
        first = Driver(recipe, run.parent.parent)
        wait_until(lambda: rounds_done(run) >= 4 or first.process.poll() is not None, "round 4")
        family = first.family()
        first.process.send_signal(number)
        sent = time.monotonic()
        assert first.ended() == (-number if number == signal.SIGKILL else 128 + number), first.said()
        if number == signal.SIGTERM:
            assert time.monotonic() - sent < GRACE_SECONDS
        wait_until_gone(family)
        assert not (run / "lease.json").exists() or number == signal.SIGKILL
        second = Driver(recipe, run.parent.parent, "--resume", "auto")
        wait_until(lambda: bool(processes_of("ray::Sampler")) or second.process.poll() is not None, "samplers")
        family = second.family()
        assert second.ended() == 0, second.said()
        wait_until_gone(family)
        # Killed, it goes on after its checkpoint, the third round's; stopped, after the last round that was whole.
        assert ("from round 4" in second.said()) == (number == signal.SIGKILL)
        return committed_fingerprint(recipe)

    return scenario


def node_removed(tables: dict) -> str:
    """A cluster of two nodes: the learner's stays, the acting side's is taken away and another comes."""
    acting = {"resources": {"acting": 1}, "num_cpus": 1, "num_gpus": 0}
    roles = {"samplers": {"count": 2, **acting}, "reward_workers": {"count": 1, **acting}}
    learner = {**tables["learner"], "resources": {"learner": 1}, "num_gpus": 0}
    recipe = Recipe.parse({**tables, "name": "nodes", "learner": learner, "runtime": {"device": "cpu"}, **roles})
    run = Path(recipe.run_path())
    with local_nodes() as nodes:
        nodes.add_node(num_cpus=2, resources={"learner": 1})
        removed = nodes.add_node(num_cpus=4, resources={"acting": 4}, object_store_memory=100_000_000)
        driver = Driver(recipe, run.parent.parent, address=nodes.address)
        wait_until(lambda: rounds_done(run) >= 3 or driver.process.poll() is not None, "round 3")
        nodes.remove_node(removed, allow_graceful=False)
        nodes.add_node(num_cpus=4, resources={"acting": 4}, object_store_memory=100_000_000)
        appeared = time.monotonic()
        wait_until(lambda: loaded("ray::Sampler") == 2 or driver.process.poll() is not None, "samplers on the new node")
        print(f"\nboth samplers were loaded {time.monotonic() - appeared:.1f} s after their node had appeared")
        assert driver.ended() == 0, driver.said()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("actor_restarts/sampler", 0) for row in metrics) >= 2, "both samplers went with the node"
    return committed_fingerprint(recipe)


def submitted(client: JobSubmissionClient, command: str) -> str:
    """Submit a job as soon as the cluster has an agent that takes it; its id."""
    jobs: list[str] = []

    def taken() -> bool:
        try:
            jobs.append(client.submit_job(entrypoint=command))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
        return bool(jobs)

    wait_until(taken, "an agent")
    return jobs[0]


def job_stopped(tables: dict) -> str:
    """Submitted as a job, scaled by another, stopped with `ray job stop`'s own grace period, and submitted again."""
    recipe = recipe_of(tables, "job", 2)
    run, file = Path(recipe.run_path()), Path(recipe.output_dir).parent / "job.toml"
    file.write_text(tomli_w.dumps(without_none(recipe.model_dump(exclude_defaults=True))))
    command = f"cd {ROOT} && {sys.executable} -m ray_ddpo train {file}"
    with local_nodes(dashboard=True) as nodes:
        nodes.add_node(num_cpus=6, dashboard_agent_listen_port=free_port())
        client = JobSubmissionClient(f"http://{nodes.head_node.webui_url}")
        first = submitted(client, command)
        ended = (JobStatus.STOPPED, JobStatus.SUCCEEDED, JobStatus.FAILED)
        wait_until(lambda: rounds_done(run) >= 4 or client.get_job_status(first) in ended, "round 4")
        jobs: list[str] = []

        def scale_and_stop() -> None:
            jobs.append(submitted(client, f"cd {ROOT} && {sys.executable} -m ray_ddpo scale {run} --samplers 3"))
            wait_until(lambda: "samplers: 2 → 3, as asked" in client.get_job_logs(first), "another number of samplers")
            client.stop_job(first)

        # While its learner is suspended, the run cannot end before it is scaled and stopped.
        while_held("ray::Learner", scale_and_stop, lambda: client.get_job_status(first) in ended)()
        assert client.get_job_status(jobs[0]) != JobStatus.FAILED, client.get_job_logs(jobs[0])
        assert client.get_job_status(first) == JobStatus.STOPPED, client.get_job_logs(first)
        newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
        assert newest is not None and load_checkpoint(newest).rounds_done >= rounds_done(run) >= 4
        wait_until(lambda: not processes_of("ray::Sampler", "ray::RewardWorker", "ray::Learner"), "the actors' end")
        assert not (run / "lease.json").exists()
        second = submitted(client, f"{command} --resume auto")
        wait_until(lambda: client.get_job_status(second) in ended, "the job's end")
        assert client.get_job_status(second) == JobStatus.SUCCEEDED, client.get_job_logs(second)
    return committed_fingerprint(recipe)


def spilling(tables: dict) -> str:
    """The store is filled with ballast, so that trajectories go to disk and come back."""
    recipe = recipe_of(tables, "spilling", 2)
    size = 10_000_000
    capacity = int(ray.cluster_resources()["object_store_memory"])
    ballast = [ray.put(np.zeros(size, np.uint8)) for _ in range(capacity // size + 2)]
    fingerprint = final_fingerprint(recipe)
    assert spilled_bytes() > 0
    del ballast
    return fingerprint


SCENARIOS: dict[str, Scenario] = {
    "1 sampler": samplers(1),
    "2 samplers": samplers(2),
    "4 samplers": samplers(4),
    "scaled 1 → 4 → 2 while it runs": scaled,
    "a sampler or reward worker killed each round": killed,
    "learner killed twice": learner_killed,
    "driver killed with SIGKILL, resumed": driver_signalled(signal.SIGKILL),
    "driver stopped with SIGTERM, resumed": driver_signalled(signal.SIGTERM),
    "scaled by a job, stopped with ray job stop, submitted again": job_stopped,
    "a node removed, another added": node_removed,
    "an object store that spills": spilling,
}
IN_PARTS = {
    "in four parts: 2 samplers": samplers(2),
    "in four parts: a sampler or reward worker killed each round": killed,
    "in four parts: learner killed twice": learner_killed,
    "in four parts: a node removed, another added": node_removed,
}
SCENARIO_OF = SCENARIOS | IN_PARTS
SHORT = {
    (2, "a sampler or reward worker killed each round"),
    (1, "learner killed twice"),
    (0, "scaled 1 → 4 → 2 while it runs"),
}


def _marked(lag: int, what: str) -> object:
    return pytest.param(lag, what, marks=pytest.mark.system if (lag, what) in SHORT else pytest.mark.same_bits)


TABLED = [(lag, what) for lag in (0, 1, 2) for what in SCENARIOS] + [(0, what) for what in IN_PARTS]


@pytest.mark.parametrize(("lag", "what"), [_marked(lag, what) for lag, what in TABLED])
def test_the_final_weights_are_those_of_a_calm_run(
    calm: Callable[[int], dict], cluster: None, lag: int, what: str
) -> None:
    tables = calm(lag)
    if what in IN_PARTS:
        tables = {**tables, "learner": {**tables["learner"], "parts_per_round": 4}}
    device = {"runtime": {"device": "cpu"}} if SCENARIO_OF[what] is node_removed else {}  # its test nodes have no GPU
    expected = calm_fingerprint({**tables, **device})
    TABLE.append(
        (lag, "in four parts: nothing, in one process" if what in IN_PARTS else "nothing, in one process", expected)
    )
    TABLE.append((lag, what, SCENARIO_OF[what](tables)))
    assert TABLE[-1][2] == expected


@pytest.mark.parametrize(
    "count",
    [pytest.param(count, marks=pytest.mark.system if count == 2 else pytest.mark.same_bits) for count in (1, 2, 4)],
)
def test_shared_prefixes_and_cached_steps_end_with_the_same_weights(
    calm: Callable[[int], dict], cluster: None, count: int
) -> None:
    tables = calm(1)
    sampling = {**tables["sampling"], "num_steps": 6, "sde_window": 2, "shared_prefix": True, "cache_interval": 2}
    learner = {**tables["learner"], "micro_batch_size": 4}
    groups = {"name": "animals", "images_per_prompt": 2}
    tables = {**tables, "rounds": 3, "sampling": sampling, "prompts": groups, "learner": learner}
    assert samplers(count)(tables) == calm_fingerprint(tables)

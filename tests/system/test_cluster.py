"""A cluster of several nodes, a job submitted to it, and what befalls both; Prometheus and the dashboard look on."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common.config import Recipe
from common.run_folder import RunFolder
from learner.checkpoint import load_checkpoint, newest_checkpoint
from tests.system.conftest import final_fingerprint
from tests.system.dashboard_pages import LookedAt, looked_at
from tests.system.disturbances import loaded, processes_of, rounds_done, title_of, wait_until, while_held
from tests.system.drivers import committed_fingerprint
from tests.system.prometheus import Prometheus, prometheus
from tests.system.started_nodes import (
    BIN,
    StartedCluster,
    StartedNode,
    cluster_token,
    node_environment,
    started_cluster,
)

pytestmark = pytest.mark.system
DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "ray_ddpo.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
ROOT = Path(__file__).parents[2]
DEMO = "deploy/recipes/demo.toml"
ROUNDS = 12
LONGEST_SECONDS = 240.0
SHORT_FORM = [
    *("--rounds", str(ROUNDS), "--max_policy_lag", "1", "--runtime.threads", "1", "--checkpoint.every", "5"),
    *("--sampling.num_steps", "6", "--sampling.batch_size", "4", "--sampling.batches_per_round", "4"),
    *("--learner.batch_size", "8", "--learner.micro_batch_size", "8"),
    *("--evaluation.every", "4", "--evaluation.images", "9"),
]
PLACES = [
    *("--learner.resources.learner", "1", "--reward_workers.resources.reward", "1"),
    *("--evaluation.workers.resources.reward", "1", "--samplers.resources.sampler", "1"),
]
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass
class Submission:
    """One call of submit.sh, which follows its job."""

    process: subprocess.Popen
    output: Path

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def ended(self) -> int:
        return self.process.wait(LONGEST_SECONDS)


@dataclass
class Story:
    """What was seen of a run that was scaled, lost a node, was stopped and was submitted again."""

    recipe: Recipe
    exit_codes: list[int] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)  # as the job API has them in the end
    rounds_when_killed: int = 0
    rounds_when_stopped: int = 0
    committed_when_stopped: int = 0
    leftovers: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    actors: dict[str, str] = field(
        default_factory=dict
    )  # those that lived with two samplers: name, and what they say of themselves
    tasks: dict[str, str] = field(default_factory=dict)  # of the run until then, and what each was a call of
    pages: dict[str, LookedAt] = field(default_factory=dict)  # of the dashboard, then
    series: list[str] = field(default_factory=list)  # in the end, the names of tasks that have series of their own
    seconds: list[tuple[str, float]] = field(default_factory=list)
    start: float = field(default_factory=time.time)
    end: float = 0.0

    @property
    def run(self) -> Path:
        return Path(self.recipe.run_path())

    def note(self, what: str) -> None:
        self.seconds.append((what, time.time() - self.start))


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[StartedCluster, list[StartedNode]]]:
    """A head, a node for the learner, and two for a sampler each."""
    with started_cluster() as cluster:
        cluster.join(3, learner=1, reward=4)
        samplers = [cluster.join(1, sampler=1) for _ in range(2)]
        cluster.wait_for(lambda: cluster.living_nodes() == 4, "four nodes")
        yield cluster, samplers


@pytest.fixture(scope="module")
def watching(nodes: tuple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with prometheus(nodes[0].discovery, tmp_path_factory.mktemp("prometheus")) as asked:
        yield asked


def environment_of(cluster: StartedCluster) -> dict[str, str]:
    """A user's shell: whence the cluster's job API is reached, and the token."""
    return {**node_environment(), "RAY_API_SERVER_ADDRESS": cluster.api}


def submitted(cluster: StartedCluster, story: Story) -> Submission:
    output = story.run.parent.parent / f"submission-{len(story.exit_codes)}.log"
    words = ["deploy/submit.sh", DEMO, story.recipe.output_dir, *SHORT_FORM, *PLACES]
    with output.open("wb") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=environment_of(cluster), stdout=file, stderr=subprocess.STDOUT)
    return Submission(process, output)


def jobs_of(cluster: StartedCluster) -> list[dict[str, Any]]:
    """The jobs that were submitted, the first first."""
    jobs = [job for job in cluster.get("/api/jobs/") if job["type"] == "SUBMISSION"]
    return sorted(jobs, key=lambda job: job["start_time"])


def wait_for_round(story: Story, submission: Submission, round: int) -> None:
    wait_until(lambda: rounds_done(story.run) >= round or submission.process.poll() is not None, f"round {round}")
    assert submission.process.poll() is None, submission.said()


def scale(cluster: StartedCluster, run: Path, samplers: int) -> None:
    command = [BIN / "ddpo", "scale", run, "--samplers", str(samplers)]
    subprocess.run(command, env=environment_of(cluster), check=True, timeout=LONGEST_SECONDS)


def look(cluster: StartedCluster, story: Story, folder: Path) -> None:
    """At what Ray says of the run while it goes on."""
    story.actors = {each["name"]: each["repr_name"] for each in cluster.listed("actors", state="ALIVE")}
    story.tasks = {each["name"]: each["func_or_class_name"] for each in cluster.listed("tasks")}
    sampler = next(each for each in cluster.listed("actors", state="ALIVE") if each["class_name"] == "Sampler")
    job = jobs_of(cluster)[0]
    expected = {
        "jobs": ("jobs", job["submission_id"]),
        "job": (f"jobs/{job['submission_id']}", "Sampler: draw round 0, task 0"),
        "actors": ("actors", "demo/sampler-0"),
        "actor": (f"actors/{sampler['actor_id']}", "Sampler: draw round 0"),
    }
    story.pages = looked_at(cluster.api, cluster_token(), expected, folder)


def lose(cluster: StartedCluster, node: StartedNode) -> None:
    """A sampler's node goes while it has a task in hand."""
    (sampler,) = [process for process in node.processes() if title_of(process).startswith("ray::Sampler")]
    sampler.suspend()
    wait_until(lambda: bool(cluster.listed("tasks", state="RUNNING")), "a task in its hands")
    node.kill()


def first_job(cluster: StartedCluster, samplers: list[StartedNode], story: Story, profile: Path) -> None:
    """Submitted, scaled from one sampler to two, robbed of a node, and stopped."""
    submission = submitted(cluster, story)
    wait_for_round(story, submission, 1)
    story.note("first round")
    while_held("ray::Learner", lambda: scale(cluster, story.run, 2), lambda: loaded("ray::Sampler") == 2)()
    story.note("scaled")
    look(cluster, story, profile)
    story.note("looked at")
    lose(cluster, samplers[0])
    story.rounds_when_killed = rounds_done(story.run)
    story.note("node lost")
    wait_for_round(story, submission, story.rounds_when_killed + 3)
    job = jobs_of(cluster)[0]["submission_id"]
    stop = ["ray", "job", "stop", job]
    subprocess.run(stop, env=environment_of(cluster), check=True, timeout=LONGEST_SECONDS, capture_output=True)
    story.exit_codes.append(submission.ended())
    story.said.append(submission.said())
    story.note("stopped")
    story.rounds_when_stopped = rounds_done(story.run)
    newest = newest_checkpoint(RunFolder(story.recipe.run_path()).checkpoints)
    story.committed_when_stopped = load_checkpoint(newest).rounds_done if newest else 0
    wait_until(lambda: not processes_of("ray::Sampler", "ray::RewardWorker", "ray::Learner"), "the actors' end")
    story.leftovers = [name for name in ("lease.json",) if (story.run / name).exists()]


def second_job(cluster: StartedCluster, story: Story) -> None:
    """The same submission again, to the run's end."""
    submission = submitted(cluster, story)
    story.exit_codes.append(submission.ended())
    story.said.append(submission.said())
    story.note("finished")


@pytest.fixture(scope="module")
def story(
    nodes: tuple[StartedCluster, list[StartedNode]], watching: Prometheus, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    cluster, samplers = nodes
    folder = tmp_path_factory.mktemp("shared")
    told = Story(Recipe.load(ROOT / DEMO, ["--output_dir", str(folder / "runs"), *SHORT_FORM, *PLACES]))
    first_job(cluster, samplers, told, tmp_path_factory.mktemp("chromium"))
    second_job(cluster, told)
    told.jobs, told.end = jobs_of(cluster), time.time()
    told.series = watching.asked("label/Name/values", start=told.start, end=told.end)
    print("\n" + ", ".join(f"{what} after {seconds:.0f} s" for what, seconds in told.seconds), file=sys.stderr)
    return told


def test_a_run_goes_on_when_a_samplers_node_is_lost(story: Story) -> None:
    assert story.rounds_when_stopped >= story.rounds_when_killed + 3


def test_a_stopped_job_has_committed_its_last_round(story: Story) -> None:
    assert [job["status"] for job in story.jobs] == ["STOPPED", "SUCCEEDED"]
    assert story.committed_when_stopped >= story.rounds_when_stopped > 0
    assert story.leftovers == []


def test_submitted_again_it_goes_on_where_it_was(story: Story) -> None:
    assert f"from round {story.committed_when_stopped + 1}," in story.said[1], story.said[1]
    assert story.exit_codes[1] == 0 and rounds_done(story.run) == ROUNDS


def test_the_weights_are_those_of_a_run_in_one_process_that_nothing_befell(story: Story, tmp_path: Path) -> None:
    calm = Recipe.load(ROOT / DEMO, ["--output_dir", str(tmp_path), *SHORT_FORM])
    assert committed_fingerprint(story.recipe) == final_fingerprint(calm, serial=True)


def test_actors_are_named_by_run_and_role_and_say_what_they_hold(story: Story) -> None:
    expected = {
        "demo/learner-0": "Learner of tiny_animals by ddpo_is on cpu",
        "demo/sampler-0": "Sampler of tiny_animals on cpu",
        "demo/sampler-1": "Sampler of tiny_animals on cpu",
        "demo/reward-worker-0": "RewardWorker of jpeg_compressibility on cpu",
        "demo/scorer-0": "RewardWorker of animal_classifier on cpu",
    }
    assert {name: says for name, says in story.actors.items() if name.startswith("demo/")} == expected


def test_tasks_say_what_is_drawn_scored_and_learned_from(story: Story) -> None:
    expected = {
        "Sampler: draw round 0, task 0 (version 0)": "Sampler.draw",
        "Sampler: draw evaluation of version 0, task 0 (version 0)": "Sampler.draw",
        "RewardWorker: score round 0, task 0, images 0-3": "RewardWorker.score",
        "Learner: learn from round 0": "Learner.update",
    }
    assert {name: story.tasks.get(name) for name in expected} == expected


def test_no_task_has_a_series_of_its_own(story: Story) -> None:
    """Each would stay in every scrape for as long as the driver lives."""
    assert [name for name in story.series if "round" in name or "version" in name] == []


def test_the_dashboards_pages_show_the_run_and_what_it_does(story: Story) -> None:
    assert {name: page.found for name, page in story.pages.items()} == dict.fromkeys(
        ("jobs", "job", "actors", "actor"), True
    )


# What has no series here, and why; the query itself must still be one that Prometheus can read.
NO_DATA = {
    "ray_node_gpus_utilization": "this machine has no GPU",
    "ray_node_gram_used": "this machine has no GPU",
    "ray_ddpo_masked_fraction": "this algorithm leaves no pair out",
    "ray_memory_manager_worker_eviction_total": "nothing ran out of memory",
}


@pytest.mark.parametrize("query", QUERIES)
def test_a_panel_has_data(story: Story, watching: Prometheus, query: str) -> None:
    filled_in = query.replace("$run", "demo").replace("$session", ".*")
    found = watching.seen(filled_in, story.start, story.end)
    reasons = [reason for metric, reason in NO_DATA.items() if metric in query]
    assert bool(found) != bool(reasons), reasons or query


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/v0/actors", "/nodes?view=summary", "/api/cluster_status"])
@pytest.mark.parametrize(("headers", "code"), [({}, 401), ({"Authorization": f"Bearer {'0' * 64}"}, 403)])
def test_without_the_token_nothing_is_told(nodes: tuple, path: str, headers: dict[str, str], code: int) -> None:
    cluster: StartedCluster = nodes[0]
    assert cluster.get(path)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(cluster.api + path, headers=headers), timeout=30)
    assert refused.value.code == code

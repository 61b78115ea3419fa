"""A short demo as a job on a cluster of several nodes: its disturbances, and observations during the run."""

import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.job_submission import JobSubmissionClient

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from tests.system.dashboard_pages import LookedAt, Wanted, looked_at
from tests.system.disturbances import loaded, processes_of, rounds_done, title_of, wait_until, while_held
from tests.system.started_nodes import BIN, StartedCluster, StartedNode, cluster_token, node_environment

ROOT = Path(__file__).parents[2]
RECIPE = "deploy/recipes/tiny/jpeg.toml"
ROUNDS = 10
LONGEST_SECONDS = 240.0
SHORT_FORM = [
    *("--rounds", str(ROUNDS), "--max_policy_lag", "1", "--runtime.threads", "1", "--checkpoint.every", "5"),
    *("--sampling.num_steps", "4", "--sampling.batch_size", "4", "--sampling.batches_per_round", "4"),
    *("--learner.batch_size", "8", "--learner.micro_batch_size", "8"),
    *("--evaluation.every", "4", "--evaluation.images", "9"),
]
PLACES = [
    *("--learner.resources.learner", "1", "--reward_workers.resources.reward", "1"),
    *("--evaluation.workers.resources.reward", "1", "--samplers.resources.sampler", "1"),
]


@dataclass
class Seen:
    """What Ray said of the run while two samplers were at work."""

    nodes: dict[str, set[str]]  # by class of actor
    actors: dict[str, str]  # by name, what they say of themselves
    tasks: dict[str, str]  # by name, what each was a call of
    pages: dict[str, LookedAt]  # of the dashboard


@dataclass
class Story:
    """What became of a run that was scaled, lost a node, was stopped and was submitted again."""

    recipe: Recipe
    start: float = field(default_factory=time.time)
    seen: Seen | None = None
    rounds_when_killed: int = 0
    rounds_when_stopped: int = 0
    committed_when_stopped: int = 0
    lease_was_left: bool = True
    exit_codes: list[int] = field(default_factory=list)  # of both calls of submit.sh
    said: list[str] = field(default_factory=list)  # by both drivers
    jobs: list[dict[str, Any]] = field(default_factory=list)  # as the job API has them in the end
    end: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # from the start

    @property
    def run(self) -> Path:
        return Path(self.recipe.run_path())

    def note(self, what: str) -> None:
        """That this is done now."""
        self.seconds[what] = time.time() - self.start


class Submission:
    """One call of submit.sh, which follows its job."""

    def __init__(self, cluster: StartedCluster, story: Story) -> None:
        self._cluster, self._story = cluster, story
        self._output = story.run.parent.parent / f"submission-{len(story.exit_codes)}.log"
        words = ["deploy/cluster/submit.sh", RECIPE, story.recipe.output_dir, *SHORT_FORM, *PLACES]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                words, cwd=ROOT, env=users_environment(cluster), stdout=output, stderr=subprocess.STDOUT
            )

    def wait_for_round(self, rounds: int) -> None:
        """Until so many rounds are done; AssertionError: the job has ended before."""
        run = self._story.run
        wait_until(lambda: rounds_done(run) >= rounds or self._process.poll() is not None, f"round {rounds}")
        assert self._process.poll() is None, self._output.read_text(errors="replace")

    def end(self) -> None:
        """Wait for it, and keep what came of it."""
        self._story.exit_codes.append(self._process.wait(LONGEST_SECONDS))
        self._story.said.append(self._cluster.job_log(jobs_of(self._cluster)[-1]["submission_id"]))


def users_environment(cluster: StartedCluster) -> dict[str, str]:
    """A user's shell: whence the cluster's job API is reached, the token, and where the driver is to be."""
    return {**node_environment(), "RAY_API_SERVER_ADDRESS": cluster.api, "DRIVER_RESOURCES": '{"driver": 1}'}


def typed(cluster: StartedCluster, *words: str) -> None:
    """A command that a user types, to its end."""
    command = [BIN / words[0], *words[1:]]
    environment = users_environment(cluster)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def jobs_of(cluster: StartedCluster) -> list[dict[str, Any]]:
    """The jobs that were submitted, the first first."""
    jobs = [job for job in cluster.get("/api/jobs/") if job["type"] == "SUBMISSION"]
    return sorted(jobs, key=lambda job: job["start_time"])


def first_job(cluster: StartedCluster, samplers: list[StartedNode], story: Story, images: Path) -> None:
    """Submit a run, scale it from one sampler to two, kill a node, and stop it. `images`: a folder for screenshots."""
    submission = Submission(cluster, story)
    submission.wait_for_round(1)
    story.note("first round")

    def scaled_and_looked_at() -> None:
        typed(cluster, "ddpo", "scale", str(story.run), "--samplers", "2")
        wait_until(lambda: loaded("ray::Sampler") == 2, "a second sampler")
        story.note("two samplers")
        story.seen = look(cluster, images)

    while_held("ray::Learner", scaled_and_looked_at, lambda: True)()
    story.note("looked at")
    lose(samplers[0])
    story.rounds_when_killed = rounds_done(story.run)
    submission.wait_for_round(story.rounds_when_killed + 3)
    story.note("three rounds without the lost node")
    JobSubmissionClient(cluster.api).stop_job(jobs_of(cluster)[0]["submission_id"])  # as `ray job stop` does
    submission.end()
    story.note("stopped")
    story.rounds_when_stopped = rounds_done(story.run)
    newest = newest_checkpoint(RunFolder(story.recipe.run_path()).checkpoints)
    story.committed_when_stopped = load_checkpoint(newest).rounds_done if newest else 0
    wait_until(lambda: not processes_of("ray::Sampler", "ray::RewardWorker", "ray::Learner"), "the actors' end")
    story.lease_was_left = (story.run / "lease.json").exists()


def second_job(cluster: StartedCluster, story: Story) -> None:
    """The same submission again, to the run's end."""
    Submission(cluster, story).end()
    story.note("finished")
    story.jobs, story.end = jobs_of(cluster), time.time()


def look(cluster: StartedCluster, images: Path) -> Seen:
    """At what Ray says of the run while it goes on."""
    actors = cluster.listed("actors", state="ALIVE")
    nodes: dict[str, set[str]] = {}
    for actor in actors:
        nodes.setdefault(actor["class_name"], set()).add(actor["node_id"])
    job = jobs_of(cluster)[0]["submission_id"]
    sampler = next(actor["actor_id"] for actor in actors if actor["name"] == "tiny_jpeg/sampler-0")
    wanted = {
        "jobs": Wanted("jobs", job),
        "job": Wanted(
            f"jobs/{job}", ": (sample|score|learn from) round [0-9]+", "Task Table"
        ),  # its first ten, in no order
        "actors": Wanted("actors", "tiny_jpeg/sampler-0"),
        "actor": Wanted(f"actors/{sampler}", ": sample round [0-9]+, task [0-9]+", "Tasks History"),
    }
    return Seen(
        nodes,
        {actor["name"]: actor["repr_name"] for actor in actors},
        {task["name"]: task["func_or_class_name"] for task in cluster.listed("tasks")},
        looked_at(cluster.api, cluster_token(), wanted, images),
    )


def lose(node: StartedNode) -> None:
    """A sampler's node goes while it has a task in hand; the name of its process says so."""
    (sampler,) = [process for process in node.processes() if title_of(process).startswith("ray::Sampler")]
    wait_until(lambda: _is_caught_drawing(sampler), "a task in its hands")
    node.kill()


def _is_caught_drawing(sampler: psutil.Process) -> bool:
    sampler.suspend()
    sampling = "sample" in title_of(sampler)
    if not sampling:
        sampler.resume()
    return sampling

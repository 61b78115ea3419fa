"""Random disturbances: kill or suspend any process of a run at random moments, and report the result."""

import contextlib
import itertools
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from ray_ddpo.common.recipe.recipe import Recipe
from tests.system.disturbances import alive, processes_of, rounds_done, wait_until
from tests.system.drivers import Driver, committed_fingerprint, wait_until_gone
from tests.system.nodes import local_nodes

ROLES = {
    "sampler": "ray::Sampler",
    "reward worker": "ray::RewardWorker",
    "learner": "ray::Learner",
    "rank": "ray::Learner",
}
VICTIMS = (*ROLES, "raylet", "GCS", "driver")
OF_ROLES = tuple(set(ROLES.values()))
NODES, CPUS_PER_NODE = 2, 5  # each holds all of the run, so that it can go on without the other
STORE_BYTES = 100_000_000
LONGEST_DELAY_SECONDS = 2.0


@dataclass(frozen=True)
class Schedule:
    """What happens to which process, and when."""

    number: int
    victim: str
    suspended_seconds: float  # 0: it is killed
    after_round: int
    delay: float  # seconds after that round
    choice: float  # which of several processes, from 0 to 1

    def __str__(self) -> str:
        act = f"{self.suspended_seconds:g} s of SIGSTOP" if self.suspended_seconds else "SIGKILL"
        return f"{self.victim}: {act} {self.delay:.2f} s after round {self.after_round}"


def schedules(count: int, seed: int, rounds: int, suspended_seconds: float) -> list[Schedule]:
    """Return `count` schedules in random order; each process is killed and suspended equally often, but for one."""
    generator = random.Random(seed)
    kinds = list(itertools.product(VICTIMS, (0.0, suspended_seconds)))
    chosen: list[tuple[str, float]] = []
    while len(chosen) < count:
        chosen += generator.sample(kinds, len(kinds))
    return [
        Schedule(
            *(number, victim, seconds, generator.randint(0, rounds - 2)),
            *(generator.uniform(0, LONGEST_DELAY_SECONDS), generator.random()),
        )
        for number, (victim, seconds) in enumerate(chosen[:count])
    ]


@dataclass
class Outcome:
    """How a disturbed run ended; `problems` is empty if that is well."""

    schedule: Schedule
    exit_code: int
    last_line: str
    resumed: bool = False
    problems: list[str] = field(default_factory=list)


@contextmanager
def chaos_nodes() -> Iterator[Cluster]:
    """A head that only drives, and the nodes that hold the run."""
    with local_nodes() as cluster:
        for _ in range(NODES):
            cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=STORE_BYTES)
        yield cluster


class Chaos:
    """Runs one schedule after the other on a cluster, which is renewed after one that it did not survive."""

    def __init__(self, folder: Path, tables: dict) -> None:
        self._folder = folder
        self._tables = tables
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._fingerprint = ""

    def __enter__(self) -> "Chaos":
        with self._stack:
            self._renew()
            calm = Recipe.parse({**self._tables, "name": "calm"})
            driver = self._driver(calm)
            assert driver.ended() == 0, driver.said()
            self._fingerprint = committed_fingerprint(calm)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _renew(self) -> None:
        self._stack.close()
        self._cluster = self._stack.enter_context(chaos_nodes())

    def _driver(self, recipe: Recipe, *options: str) -> Driver:
        assert self._cluster is not None
        return Driver(recipe, self._folder, *options, address=self._cluster.address)

    def run(self, schedule: Schedule) -> Outcome:
        """Disturb a run, and resume it if it ended for that."""
        recipe = Recipe.parse({**self._tables, "name": f"chaos-{schedule.number}"})
        driver = self._driver(recipe)
        with self._disturbed(schedule, driver, Path(recipe.run_path())):
            exit_code = driver.ended()
        lines = driver.said().strip().splitlines()
        outcome = Outcome(schedule, exit_code, lines[-1] if lines else "")
        self._look_for_rest(outcome, driver)
        if schedule.victim in ("raylet", "GCS"):
            self._renew()
        if exit_code != 0:
            outcome.resumed = True
            again = self._driver(recipe, "--resume", "auto")
            if again.ended() != 0:
                outcome.problems.append(
                    f"the resumed run ended with {again.process.returncode}: {again.said()[-2000:]}"
                )
        if not outcome.problems and committed_fingerprint(recipe) != self._fingerprint:
            outcome.problems.append("its weights are not those of the calm run")
        return outcome

    def _look_for_rest(self, outcome: Outcome, driver: Driver) -> None:
        if "Traceback (most recent call last)" in driver.said():
            outcome.problems.append(f"a traceback was printed: {driver.said()[-3000:]}")
        killed = outcome.exit_code == -signal.SIGKILL  # the driver itself, which says nothing more
        if outcome.exit_code != 0 and not killed and not outcome.last_line.startswith("ddpo"):
            outcome.problems.append(f"no line of ours was the last: {driver.said()[-2000:]}")
        try:
            wait_until_gone([*processes_of(*OF_ROLES), *driver.family()])
        except TimeoutError as error:
            outcome.problems.append(str(error))

    @contextmanager
    def _disturbed(self, schedule: Schedule, driver: Driver, run: Path) -> Iterator[None]:
        """Disturb the run as scheduled; a suspended process continues before the body has ended, or after it."""
        over = lambda: driver.process.poll() is not None  # noqa: E731
        wait_until(lambda: rounds_done(run) >= schedule.after_round or over(), f"round {schedule.after_round}")
        if schedule.after_round == 0:
            wait_until(lambda: bool(processes_of(*OF_ROLES)) or over(), "the first process")
        time.sleep(schedule.delay)
        victim = None
        with contextlib.suppress(psutil.NoSuchProcess):  # the run was faster
            victim = self._victim(schedule, driver)
            victim.send_signal(signal.SIGSTOP if schedule.suspended_seconds else signal.SIGKILL)
        if victim and schedule.suspended_seconds:
            ends = time.monotonic() + schedule.suspended_seconds
            wait_until(lambda: over() or time.monotonic() > ends, "the end of the suspension", 1000)
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGCONT)
        yield

    def _victim(self, schedule: Schedule, driver: Driver) -> psutil.Process:
        assert self._cluster is not None
        if schedule.victim == "driver":
            return psutil.Process(driver.process.pid)
        if schedule.victim == "GCS":
            return _process_of(self._cluster.head_node, "gcs_server")
        if schedule.victim == "raylet":
            nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)
            return _process_of(nodes[int(schedule.choice * len(nodes))], "raylet")
        wait_until(lambda: bool(processes_of(ROLES[schedule.victim])) or driver.process.poll() is not None, "a victim")
        found = alive(processes_of(ROLES[schedule.victim])) or [psutil.Process(driver.process.pid)]
        if schedule.victim in ("learner", "rank"):  # rank 0 is started first
            return found[0 if schedule.victim == "learner" else -1]
        return found[int(schedule.choice * len(found))]


def _process_of(node: object, kind: str) -> psutil.Process:
    return psutil.Process(node.all_processes[kind][0].process.pid)  # type: ignore[attr-defined]


def chaos_tables(tables: dict, rounds: int, watchdog_seconds: float) -> dict:
    """A recipe with every role, two samplers and two ranks."""
    return {
        **tables,
        "rounds": rounds,
        "max_policy_lag": 1,
        "samplers": {"count": 2},
        "learner": {**tables["learner"], "world_size": 2},
        "checkpoint": {"every": 2},
        "runtime": {"watchdog_seconds": watchdog_seconds},
    }

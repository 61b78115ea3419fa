"""make soak: run on Ray for many minutes with kills, scaling and a resume; report losses and memory."""

import argparse
import json
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.memory import Event, Sample, chart, growths, sample
from benchmarks.timing import machine
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.scale import scale
from tests.system.disturbances import ROLES, rounds_done, wait_until
from tests.system.drivers import Driver, committed_fingerprint, wait_until_gone
from tests.tiny_pipeline import save_tiny_pipeline

MOST_ROUNDS = 1_000_000  # more than any soak gets to
LAST_ROUNDS = 5  # after the end by the clock, so that the run also ends by itself
MOST_WORKERS = {"samplers": 3, "reward_workers": 2}
STARTING_SECONDS = 300.0


def soak_recipe(folder: Path, model: Path, lag: int) -> Recipe:
    """Return a recipe with the smallest possible rounds, so that there are many. Dead actors are always replaced."""
    elastic = {role: {"count": 2, "min": 1, "max": most} for role, most in MOST_WORKERS.items()}
    return Recipe.parse(
        {
            "name": "soaked",
            "output_dir": str(folder),
            "rounds": MOST_ROUNDS,
            "max_policy_lag": lag,
            "policy": {"name": "stable_diffusion", "model": str(model)},
            "prompts": {"name": "animals"},
            "sampling": {"num_steps": 4, "guidance_scale": 3.0, "batch_size": 4, "batches_per_round": 4},
            "reward": {"name": "jpeg_compressibility"},
            "algorithm": {"name": "ddpo_is", "clip_range": 1e-3},
            "learner": {"batch_size": 4, "micro_batch_size": 8, "learning_rate": 1e-4},
            "runtime": {"max_restarts": MOST_ROUNDS},
            **elastic,
        }
    )


@dataclass
class Soak:
    """A run in progress, sampled once a second and disturbed at random moments."""

    recipe: Recipe
    folder: Path
    seconds_between_kills: float
    seconds_between_scalings: float
    random: random.Random
    started: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    rounds: list[tuple[float, int]] = field(default_factory=list)  # seconds, rounds in metrics.jsonl

    @property
    def run(self) -> Path:
        return Path(self.recipe.run_path())

    def now(self) -> float:
        """Return the seconds since the soak began."""
        return time.monotonic() - self.started

    def start(self, *options: str) -> Driver:
        """Start a driver and wait until it has finished a round."""
        self.started = self.started or time.monotonic()
        driver = Driver(self.recipe, self.folder, *options)
        seen = [rounds_done(self.run)]

        def one_more_than_before() -> bool:  # a driver that resumes first cuts the rounds that it does again
            seen.append(rounds_done(self.run))
            return seen[-1] > seen[-2]

        wait_until(lambda: driver.process.poll() is not None or one_more_than_before(), "a round", STARTING_SECONDS)
        return driver

    def disturb(self, driver: Driver, until: float) -> None:
        """Kill and scale at random until the given time."""
        due = {self._kill: self._pause(self.seconds_between_kills)}
        due |= {self._scale: self._pause(self.seconds_between_scalings)}
        while self.now() < until:
            time.sleep(1 - self.now() % 1)
            if driver.process.poll() is not None:
                raise Lost(f"the driver ended with code {driver.process.returncode}:\n{driver.said()[-4000:]}")
            family = driver.family()
            self._look(driver, family)
            for act in [act for act, moment in due.items() if moment <= self.now()]:
                act(family)
                between = self.seconds_between_kills if act == self._kill else self.seconds_between_scalings
                due[act] = self._pause(between)

    def _pause(self, seconds: float) -> float:
        return self.now() + seconds * self.random.uniform(0.5, 1.5)

    def _look(self, driver: Driver, family: list[psutil.Process]) -> None:
        watched = [("driver", psutil.Process(driver.process.pid))]
        watched += [("learner", process) for process in of_role(family, "ray::Learner")]
        found = [sample(role, process, self.now()) for role, process in watched]
        self.samples += [each for each in found if each is not None]
        self.rounds.append((self.now(), rounds_done(self.run)))

    def _kill(self, family: list[psutil.Process]) -> None:
        victims = of_role(family, *ROLES)
        if victims:
            victim = self.random.choice(victims)
            victim.send_signal(signal.SIGKILL)
            self._note("killed", f"worker {victim.pid}")

    def _scale(self, family: list[psutil.Process]) -> None:
        wanted = {role: self.random.randint(1, most) for role, most in MOST_WORKERS.items()}
        scale(str(self.run), wanted)
        self._note("scaled", str(wanted))

    def _note(self, kind: str, what: str) -> None:
        self.events.append(Event(kind, self.now(), what))
        print(f"{self.now():7.1f} s, round {self.rounds[-1][1]}: {kind}, {what}", flush=True)

    def end(self, driver: Driver, number: signal.Signals) -> None:
        """Send a signal and check that all processes end."""
        family = driver.family()
        driver.process.send_signal(number)
        self._note("driver", f"sent {number.name}")
        code = driver.ended()
        expected = -number if number == signal.SIGKILL else 128 + number
        if code != expected:
            raise Lost(f"after {number.name} the driver ended with code {code}:\n{driver.said()[-4000:]}")
        gone(family)


class Lost(Exception):
    """The run lost something, or left something behind."""


def of_role(family: list[psutil.Process], *titles: str) -> list[psutil.Process]:
    """Return the living processes of a driver with such a title. Other runs on this machine are not touched."""
    found = []
    for process in family:
        try:
            if process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).startswith(titles):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def gone(family: list[psutil.Process]) -> None:
    """Wait until the processes of an ended driver are gone.

    Raises:
        Lost: A process is still there.
    """
    try:
        wait_until_gone(family)
    except TimeoutError as error:
        raise Lost(str(error)) from error


def soak(soaked: Soak, seconds: float) -> None:
    """Run two halves. Kill the driver with SIGKILL after the first and end it with SIGTERM after the second."""
    for until, options, number in (
        (seconds / 2, [], signal.SIGKILL),
        (seconds, ["--resume", "auto"], signal.SIGTERM),
    ):
        driver = soaked.start(*options)
        try:
            soaked.disturb(driver, until)
            soaked.end(driver, number)
        finally:
            driver.process.kill()  # does nothing to one that has ended


def finish(soaked: Soak) -> tuple[str, str, int]:
    """Let the run end. Return its fingerprint, that of an undisturbed serial run, and the number of rounds."""
    rounds = rounds_done(soaked.run) + LAST_ROUNDS
    recipe = soaked.recipe.model_copy(update={"rounds": rounds})
    driver = Driver(recipe, soaked.folder, "--resume", "auto")
    if driver.process.wait():
        raise Lost(f"the last start ended with code {driver.process.returncode}:\n{driver.said()[-4000:]}")
    calm = recipe.model_copy(update={"name": "calm"})
    print(f"a calm run of {rounds} rounds in one process, to compare", flush=True)
    serial = Driver(calm, soaked.folder, "--serial", f"--checkpoint.every={rounds}")
    if serial.process.wait():
        raise Lost(f"the calm run ended with code {serial.process.returncode}:\n{serial.said()[-4000:]}")
    return committed_fingerprint(recipe), committed_fingerprint(calm), rounds


def losses(rounds: int, logged: list[int], fingerprints: tuple[str, str]) -> list[str]:
    """Return one line for each loss."""
    found = []
    missing = sorted(set(range(rounds)) - set(logged))
    twice = sorted({round_index for round_index in logged if logged.count(round_index) > 1})
    if missing or twice or logged != sorted(logged):
        found.append(f"metrics.jsonl lacks the rounds {missing}, and has the rounds {twice} more than once")
    if fingerprints[0] != fingerprints[1]:
        found.append(f"the weights are {fingerprints[0]}, and those of the calm run {fingerprints[1]}")
    return found


def logged_rounds(run: Path) -> list[int]:
    """Return the rounds in metrics.jsonl in the order of the file."""
    return [int(json.loads(line)["round"]) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(soaked: Soak) -> dict[str, object]:
    """Return the run's disturbances and the growth of its memory."""
    kinds = [event.kind for event in soaked.events]
    return {
        "machine": machine(),
        "seconds": soaked.now(),
        "kills": kinds.count("killed"),
        "scalings": kinds.count("scaled"),
        "growth_megabytes_a_minute": [asdict(growth) for growth in growths(soaked.samples)],
    }


def outcome(soaked: Soak, seconds: float) -> dict[str, object]:
    """Soak and compare. Losses are listed under `lost`."""
    try:
        soak(soaked, seconds)
        found = figures(soaked)
        *fingerprints, rounds = finish(soaked)
    except (Lost, TimeoutError) as error:
        return {**figures(soaked), "lost": [str(error)]}
    lost = losses(rounds, logged_rounds(soaked.run), (fingerprints[0], fingerprints[1]))
    return {**found, "rounds": rounds, "fingerprints": fingerprints, "lost": lost}


def main() -> int:
    """Print the results, write results and chart, and return 1 after a loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seconds-between-kills", type=float, default=15.0)
    parser.add_argument("--seconds-between-scalings", type=float, default=40.0)
    parser.add_argument("--lag", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True)  # fails if an earlier soak left the folder
    recipe = soak_recipe(folder, save_tiny_pipeline(folder / "model"), options.lag)
    pauses = options.seconds_between_kills, options.seconds_between_scalings
    soaked = Soak(recipe, folder, *pauses, random.Random(options.seed))
    found = outcome(soaked, 60 * options.minutes)
    series = {name: [asdict(each) for each in getattr(soaked, name)] for name in ("events", "samples")}
    (folder / "soak.json").write_text(json.dumps({**found, **series, "rounds_done": soaked.rounds}))
    title = f"{found['machine']}; {found['kills']} kills, {found['scalings']} scalings"
    chart(folder / "soak.png", title, soaked.samples, soaked.events)
    print(json.dumps(found, indent=1))
    print(f"{folder / 'soak.png'}\n{folder / 'soak.json'}")
    return 1 if found["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())

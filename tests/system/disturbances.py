"""Disturbances of a run in tests (kills, scaling, signals), each from a thread, timed by the run's rounds."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

ROLES = ("ray::Sampler", "ray::RewardWorker")
LONGEST_WAIT_SECONDS = 240.0


def processes_of(*roles: str) -> list[psutil.Process]:
    """The actors of these roles on clusters that this process has started, directly or not; loaded or loading."""
    found = [process for process, title in _titles() if title.startswith(roles)]
    return sorted(found, key=lambda process: process.pid)


def loaded(role: str) -> int:
    """How many actors of a role have their models; Ray writes what an actor is doing into the name of its process."""
    return sum(title.startswith(role) and "__init__" not in title for _, title in _titles())


def _titles() -> Iterator[tuple[psutil.Process, str]]:
    return ((process, title_of(process)) for process in psutil.Process().children(recursive=True))


def title_of(process: psutil.Process) -> str:
    """A process's command line; nothing where it has ended, also between two looks."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of the processes that have not ended."""
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def rounds_done(run: Path) -> int:
    """Rounds in a run's metrics."""
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = LONGEST_WAIT_SECONDS) -> None:
    """Poll; TimeoutError names what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.05)


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work(over)` in a thread while the body runs, and raise its error. `over` is set when the body ends."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work, over)
        try:
            yield
        finally:
            over.set()
    working.result()


def kill_a_worker_each_round(run: Path, kills: list[int], seed: int = 0) -> Callable[[threading.Event], None]:
    """Send SIGKILL to a sampler and a reward worker in turn, one after each round; append process ids to `kills`."""
    generator = random.Random(seed)

    def work(over: threading.Event) -> None:
        seen = 0
        while not over.is_set():
            done = rounds_done(run)
            if done > seen:
                seen = done
                time.sleep(generator.random() * 0.3)
                victims = processes_of(ROLES[len(kills) % len(ROLES)])
                if victims and not over.is_set():
                    victim = generator.choice(victims)
                    os.kill(victim.pid, signal.SIGKILL)
                    kills.append(victim.pid)
            time.sleep(0.02)

    return work


def at_round(run: Path, rounds: int, act: Callable[[], object]) -> Callable[[threading.Event], None]:
    """Do something once, as soon as so many rounds are done."""

    def work(over: threading.Event) -> None:
        wait_until(lambda: rounds_done(run) >= rounds or over.is_set(), f"round {rounds}")
        assert not over.is_set(), f"the run ended before round {round}"
        act()

    return work


def while_held(role: str, act: Callable[[], object], until: Callable[[], bool]) -> Callable[[], None]:
    """Act and check the effect while a role's processes are suspended, so that the run cannot end before."""

    def held() -> None:
        processes = processes_of(role)
        for process in processes:
            process.suspend()
        try:
            act()
            wait_until(until, "what was asked for")
        finally:
            for process in processes:
                process.resume()

    return held


def in_turn(*works: Callable[[threading.Event], None]) -> Callable[[threading.Event], None]:
    """One disturbance after the other."""

    def work(over: threading.Event) -> None:
        for each in works:
            each(over)

    return work

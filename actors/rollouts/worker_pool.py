"""WorkerPool: the actors of a role, which are started, replaced when they die, and retired."""

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from ray_ddpo.common.process_deaths import LOADING, PROCESS_ENDED, Death, in_one_line
from ray_ddpo.common.role_loading import RoleNotStarted

TASKS_AHEAD = 2  # a worker has a running and a waiting call, so that it need not wait for a round trip
LONGEST_BACKOFF_SECONDS = 30.0
LOADS_TRIED = 3  # per wanted actor: a load that kills every process would kill the next one too


class TooManyRestarts(RuntimeError):
    """Actors keep dying. Starting more would hide the cause."""


@dataclass
class RestartBudget:
    """The number of dead actors that may be replaced before a round is done.

    There is no limit for a full run: over weeks on preemptible machines, deaths add up and mean nothing.
    """

    limit: int
    by_role: dict[str, int] = field(default_factory=dict)  # since the last report, so since the last round
    loading: dict[str, int] = field(default_factory=dict)  # consecutive deaths while a role was loading

    def spend(self, role: str, reason: str, loads: int | None = None) -> None:
        """Count a death.

        Args:
            loads: the limit of consecutive deaths while loading, if the actor died while loading.

        Raises:
            TooManyRestarts: a limit is exceeded.
        """
        self.by_role[role] = self.by_role.get(role, 0) + 1
        self.loading[role] = 0 if loads is None else self.loading.get(role, 0) + 1
        if loads is not None and self.loading[role] >= loads:
            raise TooManyRestarts(
                f"the {role} died {self.loading[role]} times in a row while it was loading, the last time so: "
                f"{reason}; ddpo train --serial loads the same in one process, and logs/ has what each one said last"
            )
        deaths = sum(self.by_role.values())
        if deaths > self.limit:
            raise TooManyRestarts(
                f"actors died {deaths} times without a round done, over runtime.max_restarts = {self.limit}; "
                f"the last was a {role}: {reason}"
            )

    def report(self) -> dict[str, int]:
        """Return the restarts by role since the last report."""
        counts, self.by_role, self.loading = self.by_role, {}, {}
        return counts


@dataclass(eq=False)
class Worker:
    """An actor, and its unfinished calls, oldest first."""

    index: int
    actor: Any
    loading: Any  # the reference to wait for; None if loaded
    since: float  # the time of the start, then of the end of loading
    calls: list[Any] = field(default_factory=list)
    head_since: float = 0.0  # since when the first of its calls is running
    suspect: bool = False  # a straggler, which gets no calls until it answers
    retiring: bool = False
    gone: bool = False  # no longer in its pool

    @property
    def name(self) -> str:
        return repr(self.actor)


class WorkerPool:
    """The wanted number of actors. `make(index)` starts one. Dead actors are replaced after a growing pause."""

    def __init__(
        self,
        name: str,
        role: str,
        make: Callable[[int], Any],
        count: int,
        budget: RestartBudget,
        on_gone: Callable[[int], None] = lambda index: None,
    ) -> None:
        """Start the workers.

        Args:
            on_gone: called with a worker's index when its process is ended or dead, so that its place is free again.
        """
        self.name = name  # for `ddpo scale`
        self.role = role  # for the count of restarts
        self.on_death: Callable[[Death], None] = lambda death: None  # a callback that reports deaths
        # A callback that compares the workers' loaded files, given the worker's name and their fingerprints. May raise.
        self.on_loaded: Callable[[str, Any], None] = lambda who, loaded: None
        self._make = make
        self._on_gone = on_gone
        self._budget = budget
        self._next_index = 0
        self._deaths_in_a_row = 0
        self._start_at: list[float] = []  # when replacements are due
        self._seconds = 0.0  # of loaded workers that are gone, since the last report
        self._reported = time.monotonic()
        self.workers: list[Worker] = []
        self._loading: dict[Any, Worker] = {}  # by the reference to wait for
        # A heap: number of calls and index of workers that may be given another call, or could once.
        self._able: list[tuple[int, int]] = []
        self._listed: dict[tuple[int, int], Worker] = {}  # the workers in the heap
        self.wanted = 0
        self.scale(count)

    @property
    def loaded(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.loading is None]

    def scale(self, count: int) -> None:
        """Start missing workers, or retire surplus ones. A retired worker finishes its calls."""
        self.wanted = count
        staying = [worker for worker in self.workers if not worker.retiring]
        for _ in range(count - len(staying) - len(self._start_at)):
            self._start()
        too_many = len(staying) + len(self._start_at) - count
        while too_many > 0 and self._start_at:
            self._start_at.pop()
            too_many -= 1
        for worker in sorted(staying, key=lambda worker: (worker.loading is None, -worker.index))[: max(0, too_many)]:
            worker.retiring = True
            self._let_go(worker)

    def _start(self) -> None:
        actor = self._make(self._next_index)
        worker = Worker(self._next_index, actor, actor.ready.remote(), time.monotonic())
        self.workers.append(worker)
        self._loading[worker.loading] = worker
        self._next_index += 1

    def _let_go(self, worker: Worker) -> None:
        if worker.retiring and not worker.calls:
            self._remove(worker)

    def _remove(self, worker: Worker) -> None:
        """Kill a worker, and remove it from all lists."""
        worker.gone = True
        for calls in range(TASKS_AHEAD):
            self._listed.pop((calls, worker.index), None)
        self._able = sorted(self._listed)
        if worker.loading is None:
            self._seconds += time.monotonic() - max(worker.since, self._reported)
        else:
            self._loading.pop(worker.loading, None)
        self.workers.remove(worker)
        ray.kill(worker.actor)
        self._on_gone(worker.index)

    def tick(self, now: float) -> None:
        """Start the replacements that are due."""
        if not self._start_at:
            return
        due = [moment for moment in self._start_at if moment <= now]
        self._start_at = [moment for moment in self._start_at if moment > now]
        for _ in due:
            self._start()

    def references(self) -> list[Any]:
        """Return the references to wait for: those of workers that are loading."""
        return list(self._loading)

    def take_loaded(self, reference: Any) -> bool:
        """Process a finished loading of a worker.

        Returns:
            False if the reference is of no worker that is loading.

        Raises:
            RoleNotStarted: the worker's constructor raised an error.
        """
        worker = self._loading.get(reference)
        if worker is None:
            return False
        try:
            answer = ray.get(reference)
        except PROCESS_ENDED as error:
            if getattr(
                error, "actor_init_failed", False
            ):  # Ray could not make the actor, and cannot make the next one either
                raise RoleNotStarted(f"{self.role}: {in_one_line(str(error))}") from error
            self.lost(worker, str(error), LOADING)
        else:
            if isinstance(answer, RoleNotStarted):  # the next worker would fail alike
                raise answer
            del self._loading[reference]
            worker.loading, worker.since = None, time.monotonic()
            self._list(worker)
            self.on_loaded(f"{self.role} {worker.index}", answer)
        return True

    def free(self, avoid: Worker | None = None) -> Worker | None:
        """Return the worker with the fewest calls that may be given another, or None.

        Args:
            avoid: a worker to choose only if no other is free.
        """
        first = self._first_able()
        if first is None or first is not avoid:
            return first
        entry = heapq.heappop(self._able)
        other = self._first_able()
        heapq.heappush(self._able, entry)
        return other or first

    def _first_able(self) -> Worker | None:
        """Return the first worker of the heap, after removing outdated entries."""
        while self._able:
            worker = self._listed[self._able[0]]
            if self._able[0] == self._key_of(worker):
                return worker
            del self._listed[heapq.heappop(self._able)]
        return None

    def _key_of(self, worker: Worker) -> tuple[int, int] | None:
        """Return a worker's key in the heap, or None if it may not be given another call."""
        able = worker.loading is None and not worker.retiring and not worker.suspect
        return (len(worker.calls), worker.index) if able and len(worker.calls) < TASKS_AHEAD else None

    def _list(self, worker: Worker) -> None:
        key = self._key_of(worker)
        if key is not None and key not in self._listed:
            self._listed[key] = worker
            heapq.heappush(self._able, key)

    def give(self, worker: Worker, call: Any, now: float) -> None:
        """Note that a call was given to a worker."""
        if not worker.calls:
            worker.head_since = now
        worker.calls.append(call)
        self._list(worker)

    def answered(self, worker: Worker, call: Any, now: float) -> float:
        """Note that a call is finished, and return its seconds, as seen by the driver."""
        self._deaths_in_a_row = 0
        seconds = now - worker.head_since
        worker.calls.remove(call)
        worker.head_since, worker.suspect = now, False
        self._let_go(worker)
        self._list(worker)
        return seconds

    def lost(self, worker: Worker, reason: str, at: str = "") -> list[Any]:
        """Remove a dead or hung worker, and schedule a replacement after a growing pause.

        Args:
            at: what the worker was doing, in words.

        Returns:
            The worker's calls, to be assigned to others.
        """
        if worker.gone:
            return []
        calls, worker.calls = worker.calls, []
        self._remove(worker)
        if not worker.retiring:
            self.on_death(Death(worker.index, reason, at))
            loads = LOADS_TRIED * self.wanted if worker.loading is not None else None
            self._budget.spend(self.role, in_one_line(reason), loads)
            pause = min(LONGEST_BACKOFF_SECONDS, 2.0 ** (self._deaths_in_a_row - 1)) if self._deaths_in_a_row else 0.0
            self._deaths_in_a_row += 1
            self._start_at.append(time.monotonic() + pause)
        return calls

    def report_seconds(self) -> float:
        """Return the seconds that workers were loaded since the last report, summed over workers."""
        now = time.monotonic()
        seconds = self._seconds + sum(now - max(worker.since, self._reported) for worker in self.loaded)
        self._seconds, self._reported = 0.0, now
        return seconds

    def close(self) -> None:
        """Kill all actors."""
        for worker in self.workers:
            ray.kill(worker.actor)
            worker.gone = True
        self.workers, self._start_at, self._loading = [], [], {}

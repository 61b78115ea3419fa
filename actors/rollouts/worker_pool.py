"""WorkerPool: the actors of one role; they come, load, work, die and are replaced, or are retired."""

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from ray_ddpo.common.process_deaths import LOADING, Death, in_one_line
from ray_ddpo.common.role_loading import RoleNotStarted

TASKS_AHEAD = 2  # a worker has one call in hand and one waiting, so that none waits for a round trip
LONGEST_BACKOFF_SECONDS = 30.0
LOADS_TRIED = 3  # for each actor that is wanted: what kills every process that loads it would kill the next one too


class TooManyRestarts(RuntimeError):
    """Actors keep dying; starting yet another would hide that something is wrong."""


@dataclass
class RestartBudget:
    """How many actors of all roles may be started in place of dead ones before a round is done.

    Not in the whole run: over weeks on machines that may be taken away, deaths add up and mean nothing.
    """

    limit: int
    by_role: dict[str, int] = field(default_factory=dict)  # since the last report, which is that of the last round
    loading: dict[str, int] = field(default_factory=dict)  # deaths in a row while a role was loading

    def spend(self, role: str, reason: str, loads: int | None = None) -> None:
        """Count a death. `loads`: it died while it was loading, and so many deaths in a row like that are too many.

        Raises:
            TooManyRestarts: a limit is passed.
        """
        self.by_role[role] = self.by_role.get(role, 0) + 1
        self.loading[role] = 0 if loads is None else self.loading.get(role, 0) + 1
        if loads is not None and self.loading[role] >= loads:
            raise TooManyRestarts(
                f"the {role} died {self.loading[role]} times in a row while it was loading, the last time so: {reason}; "
                "ddpo train --serial loads the same in one process, and logs/ has what each one said last"
            )
        deaths = sum(self.by_role.values())
        if deaths > self.limit:
            raise TooManyRestarts(
                f"actors died {deaths} times without a round done, over runtime.max_restarts = {self.limit}; "
                f"the last was a {role}: {reason}"
            )

    def report(self) -> dict[str, int]:
        """Restarts by role since the last report."""
        counts, self.by_role, self.loading = self.by_role, {}, {}
        return counts


@dataclass(eq=False)
class Worker:
    """One actor, and the calls in its hands, oldest first."""

    index: int
    actor: Any
    loading: Any  # the reference to wait for; None once it is loaded
    since: float  # when it was started, then when it was loaded
    calls: list[Any] = field(default_factory=list)
    head_since: float = 0.0  # since when it works on the first of its calls
    suspect: bool = False  # overdue: it gets nothing more until it answers
    retiring: bool = False
    gone: bool = False  # no longer of its pool

    @property
    def name(self) -> str:
        return repr(self.actor)


class WorkerPool:
    """Holds as many actors as are wanted. `make(index)` starts one; a dead one is replaced after a growing pause."""

    def __init__(self, name: str, role: str, make: Callable[[int], Any], count: int, budget: RestartBudget) -> None:
        self.name = name  # as `ddpo scale` knows it
        self.role = role  # as restarts are counted
        self.on_death: Callable[[Death], None] = lambda death: None  # set by who tells of it
        # Set by who compares what workers have loaded: told who it is and what it has loaded; it may raise an error.
        self.on_loaded: Callable[[str, Any], None] = lambda who, loaded: None
        self._make = make
        self._budget = budget
        self._next_index = 0
        self._deaths_in_a_row = 0
        self._start_at: list[float] = []  # when replacements are due
        self._seconds = 0.0  # of loaded workers that are gone, since the last report
        self._reported = time.monotonic()
        self.workers: list[Worker] = []
        self._loading: dict[Any, Worker] = {}  # by the reference to wait for
        self._able: list[
            tuple[int, int]
        ] = []  # a heap: calls in hand and index of who may be given another, or could once
        self._listed: dict[tuple[int, int], Worker] = {}  # what is in the heap
        self.wanted = 0
        self.scale(count)

    @property
    def loaded(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.loading is None]

    def scale(self, count: int) -> None:
        """Start as many as are lacking, or retire as many as are too many; a retired one finishes what it has."""
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

    def tick(self, now: float) -> None:
        """Start the replacements that are due."""
        if not self._start_at:
            return
        due = [moment for moment in self._start_at if moment <= now]
        self._start_at = [moment for moment in self._start_at if moment > now]
        for _ in due:
            self._start()

    def references(self) -> list[Any]:
        """What to wait for: workers that load their models."""
        return list(self._loading)

    def take_loaded(self, reference: Any) -> bool:
        """Whether `reference` was a worker's loading, which is over now. RoleNotStarted: its constructor raised an error."""
        worker = self._loading.get(reference)
        if worker is None:
            return False
        try:
            answer = ray.get(reference)
        except RayActorError as error:
            if error.actor_init_failed:  # Ray could not even make the actor, and could not make the next one either
                raise RoleNotStarted(f"{self.role}: {in_one_line(str(error))}") from error
            self.lost(worker, str(error), LOADING)
        else:
            if isinstance(answer, RoleNotStarted):  # the next one would not start either
                raise answer
            del self._loading[reference]
            worker.loading, worker.since = None, time.monotonic()
            self._list(worker)
            self.on_loaded(f"{self.role} {worker.index}", answer)
        return True

    def free(self, avoid: Worker | None = None) -> Worker | None:
        """The loaded worker with the fewest calls in hand that may be given another; None where none may."""
        first = self._first_able()
        if first is None or first is not avoid:
            return first
        entry = heapq.heappop(self._able)
        other = self._first_able()
        heapq.heappush(self._able, entry)
        return other or first

    def _first_able(self) -> Worker | None:
        """The first of the heap, without what is no longer as it was when it was listed."""
        while self._able:
            worker = self._listed[self._able[0]]
            if self._able[0] == self._place_of(worker):
                return worker
            del self._listed[heapq.heappop(self._able)]
        return None

    def _place_of(self, worker: Worker) -> tuple[int, int] | None:
        """Where a worker stands among those that may be given another call; None: it may not."""
        able = worker.loading is None and not worker.retiring and not worker.suspect
        return (len(worker.calls), worker.index) if able and len(worker.calls) < TASKS_AHEAD else None

    def _list(self, worker: Worker) -> None:
        place = self._place_of(worker)
        if place is not None and place not in self._listed:
            self._listed[place] = worker
            heapq.heappush(self._able, place)

    def give(self, worker: Worker, call: Any, now: float) -> None:
        """Note that `worker` has `call` in its hands."""
        if not worker.calls:
            worker.head_since = now
        worker.calls.append(call)
        self._list(worker)

    def answered(self, worker: Worker, call: Any, now: float) -> float:
        """Note that `call` is over; the seconds that it took, as the driver saw it."""
        self._deaths_in_a_row = 0
        seconds = now - worker.head_since
        worker.calls.remove(call)
        worker.head_since, worker.suspect = now, False
        self._let_go(worker)
        self._list(worker)
        return seconds

    def lost(self, worker: Worker, reason: str, at: str = "") -> list[Any]:
        """A dead or hung worker: its calls, to be given to others. Another is started after a pause that grows.

        `at`: what it was at, in words.
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
        """Seconds that loaded workers were there since the last report, summed over them."""
        now = time.monotonic()
        seconds = self._seconds + sum(now - max(worker.since, self._reported) for worker in self.loaded)
        self._seconds, self._reported = 0.0, now
        return seconds

    def close(self) -> None:
        """End all actors."""
        for worker in self.workers:
            ray.kill(worker.actor)
            worker.gone = True
        self.workers, self._start_at, self._loading = [], [], {}

"""Balance: how N GPUs should be shared by samplers and learner ranks, from the seconds that each role needs (no torch).

The rules are those of the program. Tasks are whole. A sampler takes the next task as soon as it is free. A round's
tasks may start when the version that they are sampled with is published (`common.policy_versions`). An update starts
when all of its tasks are scored and the update before it is done. Ranks share an optimizer step's images equally.

With k samplers, m ranks, n tasks of s seconds, r seconds of scoring the last task, and an update of u seconds on one
rank, a round takes these seconds if nothing else is in the way:

| layout | lag | seconds of a round |
|---|---|---|
| dedicated | 0 | ⌈n / k⌉ s + r + u / m |
| dedicated | 1 and more | max(n s / k, u / m, (⌈n / k⌉ s + r + u / m) / (lag + 1)) |
| colocated on N GPUs | 0 | ⌈n / N⌉ s + r + u / N |

Roles that share a GPU take turns, so lag and parts of a round overlap nothing there. Such a layout is offered at lag 0
and for a single GPU only.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["dedicated", "colocated"]
ROUNDS = 6  # × (lag + 1) rounds are followed, half of them before the schedule is steady
MOST_TASKS = 4096  # followed one by one; with more tasks a round, rounding to tasks hardly matters


@dataclass(frozen=True, kw_only=True)
class RoundLoad:
    """A round's work and structure. Times are in seconds, or in any other unit: only their proportions matter."""

    tasks: int  # a round
    sample: float  # of one task on one sampler
    learn: float  # of a round's update on a single rank
    score: float = 0.0  # of one task on one reward worker; 0 if it is not known
    reward_workers: int = 1
    lag: int = 0  # max_policy_lag
    parts: int = 1  # parts_per_round
    images_per_step: int = 1  # of an optimizer step
    transitions_per_image: int = 1
    micro_batch_size: int | None = None  # transitions of a rank's forward pass; None: found at the start

    def allows(self, ranks: int) -> bool:
        """Return whether the recipe's rules allow this many ranks: they share a step's images and micro-batches."""
        if self.images_per_step % ranks:
            return False
        transitions = self.images_per_step // ranks * self.transitions_per_image
        return self.micro_batch_size is None or transitions % self.micro_batch_size == 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A number of samplers and ranks on GPUs, with what is expected of it."""

    kind: Kind  # colocated: each rank shares its GPU with one sampler, in turns
    samplers: int
    ranks: int
    seconds: float  # a round
    idle_samplers: float  # share of the time in which a sampler does not sample
    idle_ranks: float  # share of the time in which a rank does not learn
    gpus: int = 0  # that are there, which may be more than the layout uses

    @property
    def gpus_used(self) -> int:
        """Return the GPUs that samplers and ranks take."""
        return max(self.ranks, self.samplers) if self.kind == "colocated" else self.samplers + self.ranks

    @property
    def idle_gpus(self) -> float:
        """Return the idle share of all GPUs that are there. In turns, one role of a GPU works while the other waits."""
        busy = self.samplers * (1 - self.idle_samplers) + self.ranks * (1 - self.idle_ranks)
        return max(0.0, 1 - busy / max(self.gpus, self.gpus_used))

    @property
    def in_words(self) -> str:
        """Name the layout: `1 sampler and 3 learner ranks`, or `4 GPUs, each with a sampler and a learner rank`."""
        if self.kind == "colocated":
            number = "1 GPU" if self.ranks == 1 else f"{self.ranks} GPUs, each"
            return f"{number} with a sampler and a learner rank in turns"
        return f"{_count(self.samplers, 'sampler')} and {_count(self.ranks, 'learner rank')}"


def expected(load: RoundLoad, samplers: int, ranks: int, kind: Kind = "dedicated", gpus: int = 0) -> Layout:
    """Return the expected seconds and idle shares of a layout, from its schedule task by task."""
    followed = load
    if load.tasks > MOST_TASKS:  # the same round in fewer and longer tasks
        size = load.tasks / MOST_TASKS
        followed = replace(load, tasks=MOST_TASKS, sample=load.sample * size, score=load.score * size)
    follow = _seconds_in_turns if kind == "colocated" else _seconds_side_by_side
    seconds = follow(followed, samplers, ranks)
    return Layout(
        kind=kind,
        samplers=samplers,
        ranks=ranks,
        seconds=seconds,
        idle_samplers=_idle(load.tasks * load.sample / samplers, seconds),
        idle_ranks=_idle(load.learn / ranks, seconds),
        gpus=gpus,
    )


def layouts(load: RoundLoad, gpus: int, most_samplers: int | None = None) -> list[Layout]:
    """Return every layout of `gpus` GPUs that the recipe's rules allow, the fastest first.

    Of equally fast layouts, the one with fewer GPUs comes first.

    Args:
        load: of a round.
        gpus: number of GPUs.
        most_samplers: samplers that the recipe allows. None: any number.
    """
    most = gpus if most_samplers is None else most_samplers
    found = [
        expected(load, min(samplers, most), ranks, kind, gpus)
        for kind, samplers, ranks in _candidates(load, gpus)
        if kind == "dedicated" or samplers <= most
    ]
    return sorted(found, key=lambda layout: (_compared(layout), layout.gpus_used))


def best(load: RoundLoad, gpus: int) -> Layout:
    """Return the fastest layout of `gpus` GPUs.

    Raises:
        ValueError: there is no GPU.
    """
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}: samplers and learner need at least one")
    return layouts(load, gpus)[0]


def _candidates(load: RoundLoad, gpus: int) -> Iterator[tuple[Kind, int, int]]:
    """Yield kind, samplers and ranks. A single rank is always allowed."""
    for ranks in range(1, gpus + 1):
        if ranks > 1 and not load.allows(ranks):
            continue
        if gpus == 1 or (load.lag == 0 and load.parts == 1):
            yield "colocated", ranks, ranks
        if ranks < gpus:
            in_flight = load.tasks * (load.lag + 1)  # more samplers would have no task
            yield "dedicated", min(gpus - ranks, in_flight), ranks


def _seconds_side_by_side(load: RoundLoad, samplers: int, ranks: int) -> float:
    """Follow samplers, reward workers and learner over rounds, and return the steady seconds of a round."""
    update, per_part = load.learn / ranks / load.parts, max(1, load.tasks // load.parts)
    sampling, scoring = [0.0] * samplers, [0.0] * load.reward_workers
    published = [0.0]  # when each version was
    rounds = ROUNDS * (load.lag + 1)
    for index in range(rounds):
        start, done = published[max(0, index - load.lag)], published[-1]
        for first in range(0, load.tasks, per_part):
            scored = done
            for _ in range(first, min(first + per_part, load.tasks)):
                sampled = _take(sampling, start, load.sample)
                scored = max(scored, _take(scoring, sampled, load.score))
            done = scored + update
        published.append(done)
    steady = rounds // 2
    return (published[rounds] - published[rounds - steady]) / steady


def _seconds_in_turns(load: RoundLoad, samplers: int, ranks: int) -> float:
    """Return the seconds of a round whose sampling and update take turns on the same GPUs."""
    return _seconds_side_by_side(replace(load, lag=0, parts=1), samplers, ranks)


def _take(workers: list[float], start: float, seconds: float) -> float:
    """Give a task to the worker that is free first. Return when the task is done."""
    done = max(workers[0], start) + seconds
    heapq.heapreplace(workers, done)
    return done


def _idle(busy: float, seconds: float) -> float:
    return min(1.0, max(0.0, 1 - busy / seconds)) if seconds else 0.0


def _compared(layout: Layout) -> float:
    """Return the seconds without rounding errors, which must not decide between equal layouts."""
    return float(f"{layout.seconds:.9g}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"

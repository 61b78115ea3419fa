"""Name a run's bottleneck in one sentence, and what to change, from its rounds' metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

BUSY = 0.9  # a role that is busy for this share of the time is a bottleneck
IDLE = {"samplers": "idle/sampler", "reward workers": "idle/reward_worker", "learner": "idle/learner"}
Metrics = dict[str, float]


@dataclass(frozen=True)
class RoundSeconds:
    """Mean seconds of a round's phases. Sampling and scoring are summed over its tasks."""

    sampling: float
    scoring: float
    learning: float
    round: float  # wall-clock time

    def longest_phase(self, samplers: int, reward_workers: int) -> float:
        """Return the duration of a round if everything overlaps."""
        return max(self.sampling / samplers, self.scoring / reward_workers, self.learning)


def bottleneck(rounds: Sequence[Metrics], max_policy_lag: int, samplers: int, reward_workers: int) -> str:
    """Describe the bottleneck in one sentence, from the mean over the last half of `rounds`."""
    if not rounds:
        return "no round was done, so there is no bottleneck to name"
    last = rounds[len(rounds) // 2 :]
    seconds = ("seconds/sample", "seconds/score", "seconds/learn", "seconds/round")
    times = RoundSeconds(*(_mean(last, name) for name in seconds))
    busy = {role: _busy(last, name) for role, name in IDLE.items()}
    second, first = sorted(busy, key=lambda role: busy[role])[-2:]
    if busy[first] < BUSY:
        return _no_overlap(busy, times, max_policy_lag, times.longest_phase(samplers, reward_workers))
    if busy[second] >= BUSY:
        both = " and ".join(f"{role} ({_percent(busy[role])})" for role in (first, second))
        return f"{both} are busy all the time: neither waits for the other, and only more or faster ones of both would help"
    if first == "learner":
        return _slow_learner(busy, times, samplers)
    return _too_few_workers(first, busy, times, samplers, reward_workers)


def _mean(rounds: Sequence[Metrics], name: str) -> float:
    values = [metrics[name] for metrics in rounds if math.isfinite(metrics[name])]
    return sum(values) / len(values) if values else math.nan


def _busy(rounds: Sequence[Metrics], name: str) -> float:
    idle = _mean(rounds, name)
    return 0.0 if math.isnan(idle) else 1 - idle


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _no_overlap(busy: dict[str, float], times: RoundSeconds, max_policy_lag: int, longest_phase: float) -> str:
    """Describe roles that wait for each other in turn. One more round in flight would overlap them."""
    # A round's latency is shared by the lag + 1 rounds in flight.
    ideal = max(longest_phase, times.round * (max_policy_lag + 1) / (max_policy_lag + 2))
    roles = ("samplers", "learner") if max_policy_lag == 0 else tuple(busy)
    idle = ", ".join(f"{role} idle {_percent(1 - busy[role])}" for role in roles)
    return (
        f"{idle}: they wait for each other; max_policy_lag = {max_policy_lag + 1} would overlap them, "
        f"and a round would ideally take {ideal:.3g} s instead of {times.round:.3g} s"
    )


def _slow_learner(busy: dict[str, float], times: RoundSeconds, samplers: int) -> str:
    """Describe a learner that all samplers wait for."""
    enough = min(samplers, max(1, math.ceil(times.sampling / times.learning)))
    fewer = f"; {enough} of the {samplers} samplers would do" if enough < samplers else ""
    return (
        f"samplers idle {_percent(1 - busy['samplers'])}: the learner is the bottleneck "
        f"(busy {_percent(busy['learner'])} of the time); "
        f"a faster device for it, more learner.world_size or a larger learner.micro_batch_size would help{fewer}"
    )


def _too_few_workers(role: str, busy: dict[str, float], times: RoundSeconds, samplers: int, reward_workers: int) -> str:
    """Describe samplers or reward workers that the learner waits for, and the effect of one more."""
    if role == "samplers":
        count, ideal = samplers, times.longest_phase(samplers + 1, reward_workers)
    else:
        count, ideal = reward_workers, times.longest_phase(samplers, reward_workers + 1)
    return (
        f"learner idle {_percent(1 - busy['learner'])}: add a {role.removesuffix('s')} "
        f"({role} are busy {_percent(busy[role])} of the time); "
        f"with {count + 1} a round would ideally take {ideal:.3g} s instead of {times.round:.3g} s"
    )

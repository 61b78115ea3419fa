"""What a run waits for: one sentence that names the bottleneck and says what to change, from the metrics of its rounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

BUSY = 0.9  # of the time: then a role is what the others wait for
IDLE = {"samplers": "idle/sampler", "reward workers": "idle/reward_worker", "learner": "idle/learner"}
Metrics = dict[str, float]


@dataclass(frozen=True)
class Pace:
    """A round's mean seconds. Sampling and scoring are summed over its tasks."""

    sampling: float
    scoring: float
    learning: float
    round: float

    def longest_part(self, samplers: int, reward_workers: int) -> float:
        """What a round takes where everything overlaps."""
        return max(self.sampling / samplers, self.scoring / reward_workers, self.learning)


def bottleneck(
    rounds: Sequence[Metrics], max_policy_lag: int, samplers: int, reward_workers: int, can_overlap: bool = True
) -> str:
    """Name the bottleneck in one sentence, from the mean over the last half of `rounds`.

    Args:
        rounds: metrics of rounds.
        max_policy_lag: of the recipe.
        samplers: their number.
        reward_workers: their number.
        can_overlap: False if the roles share too few cores to work at the same time.
    """
    if not rounds:
        return "no round was done, so there is no bottleneck to name"
    last = rounds[len(rounds) // 2 :]
    seconds = ("seconds/sample", "seconds/score", "seconds/learn", "seconds/round")
    pace = Pace(*(_mean(last, name) for name in seconds))
    busy = {role: _busy(last, name) for role, name in IDLE.items()}
    second, first = sorted(busy, key=lambda role: busy[role])[-2:]
    if busy[first] < BUSY:
        if not can_overlap:
            idle = ", ".join(f"{role} idle {_percent(1 - busy[role])}" for role in ("samplers", "learner"))
            return f"{idle}: they take turns on the same cores, so there is nothing to overlap"
        return _overlap(busy, pace, max_policy_lag, pace.longest_part(samplers, reward_workers))
    if busy[second] >= BUSY:
        both = " and ".join(f"{role} ({_percent(busy[role])})" for role in (first, second))
        return f"{both} are busy all the time: neither waits for the other, and only more or faster ones of both would help"
    if first == "learner":
        return _learner(busy, pace, samplers)
    return _one_more(first, busy, pace, samplers, reward_workers)


def _mean(rounds: Sequence[Metrics], name: str) -> float:
    values = [metrics[name] for metrics in rounds if math.isfinite(metrics[name])]
    return sum(values) / len(values) if values else math.nan


def _busy(rounds: Sequence[Metrics], name: str) -> float:
    idle = _mean(rounds, name)
    return 0.0 if math.isnan(idle) else 1 - idle


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _overlap(busy: dict[str, float], pace: Pace, max_policy_lag: int, longest_part: float) -> str:
    """Each waits for another's part of the same round: with one more round under way they would overlap."""
    # A round takes the time from its first task to its weights, divided among the lag + 1 rounds under way.
    ideal = max(longest_part, pace.round * (max_policy_lag + 1) / (max_policy_lag + 2))
    roles = ("samplers", "learner") if max_policy_lag == 0 else tuple(busy)
    idle = ", ".join(f"{role} idle {_percent(1 - busy[role])}" for role in roles)
    return (
        f"{idle}: they wait for each other; max_policy_lag = {max_policy_lag + 1} would overlap them, "
        f"and a round would ideally take {ideal:.3g} s instead of {pace.round:.3g} s"
    )


def _learner(busy: dict[str, float], pace: Pace, samplers: int) -> str:
    enough = min(samplers, max(1, math.ceil(pace.sampling / pace.learning)))
    fewer = f"; {enough} of the {samplers} samplers would do" if enough < samplers else ""
    return (
        f"samplers idle {_percent(1 - busy['samplers'])}: the learner is the bottleneck "
        f"(busy {_percent(busy['learner'])} of the time); "
        f"a faster device for it, more learner.world_size or a larger learner.micro_batch_size would help{fewer}"
    )


def _one_more(role: str, busy: dict[str, float], pace: Pace, samplers: int, reward_workers: int) -> str:
    if role == "samplers":
        count, ideal = samplers, pace.longest_part(samplers + 1, reward_workers)
    else:
        count, ideal = reward_workers, pace.longest_part(samplers, reward_workers + 1)
    return (
        f"learner idle {_percent(1 - busy['learner'])}: add a {role.removesuffix('s')} "
        f"({role} are busy {_percent(busy[role])} of the time); "
        f"with {count + 1} a round would ideally take {ideal:.3g} s instead of {pace.round:.3g} s"
    )

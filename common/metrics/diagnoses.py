"""Diagnose a run from its rounds' metrics: name the bottleneck, and detect that the reward collapsed."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ray_ddpo.common.balance import Kind, RoundLoad, best, expected

BUSY = 0.9  # a role that is busy for this share of the time is a bottleneck
GAIN = 0.1  # by which another split must be faster to be named: the stand-ins' rounds agree with it within as much
IDLE = {"samplers": "idle/sampler", "reward workers": "idle/reward_worker", "learner": "idle/learner"}
SECONDS = ("seconds/sample", "seconds/score", "seconds/learn", "seconds/round")
NEEDED = (*SECONDS, *IDLE.values())  # metrics of a round that `bottleneck` reads
Metrics = dict[str, float]


@dataclass(frozen=True)
class RoundSeconds:
    """Mean seconds of a round's phases. Sampling and scoring are summed over its tasks."""

    sampling: float
    scoring: float
    learning: float
    round: float  # wall-clock time


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The actors of a run and the structure of its rounds, with the fields of a `RoundLoad` but its times."""

    kind: Kind = "dedicated"
    samplers: int
    ranks: int = 1
    reward_workers: int
    gpus: int = 0  # of samplers and learner; 0: they compute on the CPU
    tasks: int  # a round
    lag: int
    parts: int = 1
    images_per_step: int = 1
    transitions_per_image: int = 1
    micro_batch_size: int | None = None

    def load(self, times: RoundSeconds) -> RoundLoad:
        """Return the load that measured seconds are."""
        return RoundLoad(
            tasks=self.tasks,
            sample=times.sampling / self.tasks,
            learn=times.learning * self.ranks,
            score=times.scoring / self.tasks,
            reward_workers=self.reward_workers,
            lag=self.lag,
            parts=self.parts,
            images_per_step=self.images_per_step,
            transitions_per_image=self.transitions_per_image,
            micro_batch_size=self.micro_batch_size,
        )


def bottleneck(rounds: Sequence[Metrics], roles: Roles, can_overlap: bool = True) -> str:
    """Describe the bottleneck in one sentence, from the mean over the last half of `rounds`.

    If not `can_overlap`, the roles share too few cores to work at the same time.
    """
    if not rounds:
        return "no round was done, so there is no bottleneck to name"
    last = rounds[len(rounds) // 2 :]
    times = RoundSeconds(*(_mean(last, name) for name in SECONDS))
    idle_shares = {role: _mean(last, name) for role, name in IDLE.items()}
    busy = {role: 0.0 if math.isnan(idle) else 1 - idle for role, idle in idle_shares.items()}
    return _slowest(busy, times, roles, can_overlap) + _better_split(roles.load(times), times, roles)


def _slowest(busy: dict[str, float], times: RoundSeconds, roles: Roles, can_overlap: bool) -> str:
    """Describe the role that the others wait for, and the effect of one more worker or round in flight."""
    if roles.kind == "colocated":
        return _in_turns(busy, roles)
    second, first = sorted(busy, key=lambda role: busy[role])[-2:]
    if busy[first] < BUSY:
        idle = ", ".join(f"{role} idle {_percent(1 - busy[role])}" for role in ("samplers", "learner"))
        if not can_overlap:
            return f"{idle}: they take turns on the same cores, so there is nothing to overlap"
        return _no_overlap(busy, times, roles)
    if busy[second] >= BUSY:
        both = " and ".join(f"{role} ({_percent(busy[role])})" for role in (first, second))
        return (
            f"{both} are busy all the time: neither waits for the other, and only more or faster ones of both "
            "would help"
        )
    if first == "learner":
        return _slow_learner(busy, times, roles)
    return _too_few_workers(first, busy, times, roles)


def _better_split(load: RoundLoad, times: RoundSeconds, roles: Roles) -> str:
    """Name the split of the run's GPUs that `ddpo plan` would name if it knew these seconds; empty if none is faster."""
    if not roles.gpus or not math.isfinite(load.sample + load.learn + load.score):
        return ""
    found = best(load, roles.gpus)
    if found.seconds > (1 - GAIN) * times.round:
        return ""
    plural = "s" if roles.gpus > 1 else ""
    return (
        f"; on {roles.gpus} GPU{plural}, {found.in_words} would ideally take {found.seconds:.3g} s a round, "
        "and ddpo plan prints the keys"
    )


def _in_turns(busy: dict[str, float], roles: Roles) -> str:
    """Describe how busy devices are that samplers and learner ranks share in turns."""
    sampling, learning = busy["samplers"], busy["learner"]
    says = f"samplers and learner share their devices in turns: sampling {_percent(sampling)} of the time, "
    says += f"learning {_percent(learning)}"
    if sampling + learning >= BUSY:
        return f"{says}; only more or faster devices would help"
    says += f", idle {_percent(1 - sampling - learning)}"
    if roles.tasks % roles.samplers:
        return f"{says}: with a multiple of {roles.samplers} for sampling.batches_per_round no sampler would wait for others"
    return f"{says}, while the last images are scored and all wait for the slowest: more reward workers would help"


def _mean(rounds: Sequence[Metrics], name: str) -> float:
    values = [metrics[name] for metrics in rounds if math.isfinite(metrics[name])]
    return sum(values) / len(values) if values else math.nan


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _no_overlap(busy: dict[str, float], times: RoundSeconds, roles: Roles) -> str:
    """Describe roles that wait for each other in turn. One more round in flight would overlap them."""
    ideal = expected(replace(roles.load(times), lag=roles.lag + 1), roles.samplers, roles.ranks).seconds
    names = ("samplers", "learner") if roles.lag == 0 else tuple(busy)
    idle = ", ".join(f"{role} idle {_percent(1 - busy[role])}" for role in names)
    return (
        f"{idle}: they wait for each other; max_policy_lag = {roles.lag + 1} would overlap them, "
        f"and a round would ideally take {ideal:.3g} s instead of {times.round:.3g} s"
    )


def _slow_learner(busy: dict[str, float], times: RoundSeconds, roles: Roles) -> str:
    """Describe a learner that all samplers wait for, and the number of samplers that would make rounds as short."""
    load = roles.load(times)
    limit = 1.01 * expected(load, roles.samplers, roles.ranks).seconds
    counts = range(1, roles.samplers + 1)
    enough = 1 + bisect_left(counts, True, key=lambda count: expected(load, count, roles.ranks).seconds <= limit)
    fewer = f"; {enough} of the {roles.samplers} samplers would do" if enough < roles.samplers else ""
    return (
        f"samplers idle {_percent(1 - busy['samplers'])}: the learner is the bottleneck "
        f"(busy {_percent(busy['learner'])} of the time); "
        f"a faster device for it, more learner.world_size or a larger learner.micro_batch_size would help{fewer}"
    )


def _too_few_workers(role: str, busy: dict[str, float], times: RoundSeconds, roles: Roles) -> str:
    """Describe samplers or reward workers that the learner waits for, and the effect of one more."""
    load, samplers, count = roles.load(times), roles.samplers, roles.reward_workers + 1
    if role == "samplers":
        count = samplers = samplers + 1
    else:
        load = replace(load, reward_workers=count)
    ideal = expected(load, samplers, roles.ranks).seconds
    return (
        f"learner idle {_percent(1 - busy['learner'])}: add a {role.removesuffix('s')} "
        f"({role} are busy {_percent(busy[role])} of the time); "
        f"with {count} a round would ideally take {ideal:.3g} s instead of {times.round:.3g} s"
    )


DEVIATIONS = 2.0  # standard deviations of the images' rewards that the mean must fall by
ERRORS = 4.0  # also in standard errors of the difference between rounds, and in typical changes between rounds
AVERAGED = 3  # a round is compared with the mean of this many rounds
FEW_GROUPS = 4  # with fewer groups per round, the choice of prompts alone may move the mean that far
MANY_CHANGES = 8  # changes between rounds, from which the typical size is then estimated


@dataclass(frozen=True)
class Collapse:
    """A fall of the mean reward within one round."""

    round: int
    before: float  # the highest level before
    after: float
    std: float  # of the images' rewards before

    @property
    def says(self) -> str:
        """Describe the fall: from, to, and in standard deviations."""
        return (
            f"from {self.before:.4g} to {self.after:.4g}, {(self.before - self.after) / self.std:.1f} standard "
            "deviations of the images' rewards"
        )


@dataclass
class CollapseWatch:
    """A detector that takes the mean and standard deviation of every round of this start, in order."""

    groups: int  # per round
    learning_rate: float
    collapse: Collapse | None = None  # the latest
    _means: list[float] = field(default_factory=list)
    _stds: list[float] = field(default_factory=list)
    _level: float = -math.inf  # the highest mean over AVERAGED successive rounds

    def add(self, round_index: int, mean: float, std: float) -> str | None:
        """Take a round. Return what to tell the user if the reward collapsed in this round."""
        if not (math.isfinite(mean) and math.isfinite(std)):
            return None
        found = None
        if self._fell(mean) and not self._is_down:
            self.collapse = Collapse(round_index, self._level, mean, self._typical_std)
            found = f"the reward collapsed in round {round_index + 1}: {self.collapse.says}; {self._advice}"
        self._means.append(mean)
        self._stds.append(std)
        if not self._is_down:
            last = self._means[-AVERAGED:]
            self._level = max(self._level, sum(last) / len(last))
        return found

    def at_end(self) -> str | None:
        """Return what to tell the user at the end of the run if the reward has not recovered."""
        if self.collapse is None or not self._is_down:
            return None
        return (
            f"the reward collapsed in round {self.collapse.round + 1}, {self.collapse.says}, and has not come back: "
            f"it ends at {self._means[-1]:.4g}; {self._advice}"
        )

    @property
    def _advice(self) -> str:
        return f"most likely learner.learning_rate = {self.learning_rate:g} is too high: try a third of it"

    @property
    def _typical_std(self) -> float:
        return sum(self._stds) / len(self._stds)

    @property
    def _is_down(self) -> bool:
        """Return whether the last round is less than halfway back to the level before the collapse."""
        if self.collapse is None or not self._means:
            return False
        return self._means[-1] < (self.collapse.before + self.collapse.after) / 2

    def _fell(self, mean: float) -> bool:
        """Return whether this mean is further below the level than noise explains."""
        if not self._means or self._typical_std == 0:
            return False
        changes = sorted(abs(after - before) for before, after in zip(self._means[:-1], self._means[1:], strict=True))
        noise = [DEVIATIONS * self._typical_std, ERRORS * self._typical_std * math.sqrt(2 / self.groups)]
        if self.groups < FEW_GROUPS:  # then the images tell little about the variation between rounds
            if len(changes) < MANY_CHANGES:
                return False
            noise.append(2 * changes[-1])
        elif changes:
            noise.append(ERRORS * changes[len(changes) // 2])
        return self._level - mean > max(noise)

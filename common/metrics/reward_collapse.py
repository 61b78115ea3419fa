"""Detect that the reward collapsed: it fell further in one round than prompts or noise can explain."""

import math
from dataclasses import dataclass, field

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
            f"from {self.before:.4g} to {self.after:.4g}, {(self.before - self.after) / self.std:.1f} standard deviations "
            "of the images' rewards"
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
        """Return whether this mean lies further below the level than noise explains."""
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

"""CollapseWatch: says when a run's reward falls so far in one round that neither prompts nor noise can be the reason."""

import math
from dataclasses import dataclass, field

DEVIATIONS = 2.0  # of the images' rewards, that the mean must fall
ERRORS = 4.0  # standard errors of the difference between two rounds, and typical steps between rounds, likewise
AVERAGED = 3  # rounds whose mean is the level that a later round is compared with
FEW_GROUPS = 4  # in a round: with fewer, a round's prompts alone may move its mean that far
MANY_STEPS = 8  # between rounds: then they tell it instead


@dataclass(frozen=True)
class Collapse:
    """A fall of the mean reward within one round."""

    round: int
    before: float  # the highest level until then
    after: float
    std: float  # of the images' rewards before

    @property
    def says(self) -> str:
        """Return from where to where, and in standard deviations."""
        return (
            f"from {self.before:.4g} to {self.after:.4g}, {(self.before - self.after) / self.std:.1f} standard deviations "
            "of the images' rewards"
        )


@dataclass
class CollapseWatch:
    """Takes the mean and standard deviation of every round of this start, in order."""

    groups: int  # of images with one prompt, in a round
    learning_rate: float
    collapse: Collapse | None = None  # the last one
    _means: list[float] = field(default_factory=list)
    _stds: list[float] = field(default_factory=list)
    _level: float = -math.inf  # the highest mean of some neighbouring rounds

    def add(self, round: int, mean: float, std: float) -> str | None:
        """Take a round; return what to tell the user if the reward has collapsed in it."""
        if not (math.isfinite(mean) and math.isfinite(std)):
            return None
        found = None
        if self._fell(mean) and not self._is_down:
            self.collapse = Collapse(round, self._level, mean, self._typical_std)
            found = f"the reward collapsed in round {round + 1}: {self.collapse.says}; {self._advice}"
        self._means.append(mean)
        self._stds.append(std)
        if not self._is_down:
            last = self._means[-AVERAGED:]
            self._level = max(self._level, sum(last) / len(last))
        return found

    def at_end(self) -> str | None:
        """Return what to tell the user at the end of the run, if the reward has not come back."""
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
        """Return whether the last round is still less than halfway back to the level before the collapse."""
        if self.collapse is None or not self._means:
            return False
        return self._means[-1] < (self.collapse.before + self.collapse.after) / 2

    def _fell(self, mean: float) -> bool:
        if not self._means or self._typical_std == 0:
            return False
        steps = sorted(abs(after - before) for before, after in zip(self._means[:-1], self._means[1:], strict=True))
        noise = [DEVIATIONS * self._typical_std, ERRORS * self._typical_std * math.sqrt(2 / self.groups)]
        if self.groups < FEW_GROUPS:  # the images say little of how far one round lies from another
            if len(steps) < MANY_STEPS:
                return False
            noise.append(2 * steps[-1])
        elif steps:
            noise.append(ERRORS * steps[len(steps) // 2])
        return self._level - mean > max(noise)

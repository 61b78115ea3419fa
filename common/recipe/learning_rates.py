"""The keys of a learner's learning rate over a run: warmup and schedule (no torch)."""

from typing import Literal

from pydantic import Field, model_validator

from ray_ddpo.common.recipe.bounds import Bounded


class LearningRates(Bounded):
    """Learning rate, its warmup and its schedule. They are keys of `[learner]`."""

    learning_rate: float = Field(default=3e-4, gt=0)
    """Learning rate of AdamW: the highest one, if there is a warmup or a schedule."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps at the start of the run over which the learning rate rises linearly. 0: no warmup."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warmup, up to optimizer step `decay_steps` of the run."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, with the warmup's, after which the learning rate is `final_learning_rate`.

    `linear` and `cosine` need it. It does not depend on `rounds`, so that a run can be resumed with more of them.
    """
    final_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate at the end of a `linear` or `cosine` schedule."""

    @property
    def rate_changes(self) -> bool:
        """Return whether the learning rate changes during the run."""
        return self.warmup_steps > 0 or self.learning_rate_schedule != "constant"

    @model_validator(mode="after")
    def _the_schedule_can_be_followed(self) -> "LearningRates":
        """Refuse a decay without its end, with one before the warmup's, or upwards, and keys of a decay without one."""
        kind, end, final = self.learning_rate_schedule, self.decay_steps, self.final_learning_rate
        if kind == "constant":
            if end is not None or final:
                given = f"decay_steps is {end}" if end is not None else f"final_learning_rate is {final:g}"
                raise ValueError(
                    f'{given} and learning_rate_schedule \'constant\': give "linear" or "cosine", or leave it out'
                )
            return self
        if end is None or end <= self.warmup_steps:
            raise ValueError(
                f"learning_rate_schedule is {kind!r}, warmup_steps {self.warmup_steps} and decay_steps {end}: give the "
                "optimizer steps of the run, more than the warmup's, after which the rate is at its end (ddpo plan says "
                "how many a round has)"
            )
        if final > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {final:g} is above learning_rate {self.learning_rate:g}: a schedule only falls"
            )
        return self

"""The learning rate of each optimizer step: warmup, then a schedule, as pure functions of the step's number in the run.

Nothing of it is state: a resumed run finds the rate of its next step by the step's number.
"""

import math

from ray_ddpo.common.recipe.tables import LearnerTable


def learning_rate(settings: LearnerTable, step: int) -> float:
    """Return the learning rate of optimizer step `step` of the run, counted from 0.

    Step i of a warmup of w steps has (i + 1) / w of the rate. From there it stays, or falls to `final_learning_rate` at
    step `decay_steps`: linearly, or by half a cosine (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    peak, final, warmup = settings.learning_rate, settings.final_learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.learning_rate_schedule == "constant" or settings.decay_steps is None:
        return peak
    progress = min(1.0, (step - warmup) / (settings.decay_steps - warmup))
    if settings.learning_rate_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return peak + (final - peak) * progress

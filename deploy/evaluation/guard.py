"""Guard: detect reward hacking (over-optimization) by comparing held-out images with the pretrained model's.

Pure functions.

A rising reward does not show reward hacking (Goodhart's law; for DDPO: Black et al. 2023, section 6.3). The guard
therefore looks at scores and image statistics that are not trained on, for the same prompts and noise.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.metrics.statistics import paired_change
from ray_ddpo.common.recipe.tables import GuardTable

SHARES = (
    "edge_density",
    "sharpness",
    "entropy",
    "diversity",
)  # statistics that must keep a share of their value, and recipe keys


@dataclass(frozen=True)
class VersionStats:
    """Scores and image statistics of one policy version on the evaluation set."""

    scores: dict[str, Float[np.ndarray, "N"]]  # by reward and scorer; NaN if an image has no score
    images: dict[str, float]  # means over the images: dark_share, and those of SHARES
    kl_reference_nats: float | None = None  # of a denoising step, to the pretrained model; None: not measured
    saturation: float | None = None  # share of the images with the best possible reward; None: it has no bound
    means: dict[str, float] = field(default_factory=dict)  # of `scores`, by the rule of the suite that is followed


@dataclass(frozen=True)
class Alarm:
    """A finding of the guard: its subject, and a sentence with its numbers."""

    about: str
    says: str


@dataclass(frozen=True)
class JudgedVersion:
    """An evaluated policy version with the guard's alarms."""

    policy_version: int
    stats: VersionStats
    alarms: tuple[Alarm, ...]

    def score(self, best_by: str) -> float:
        """Return the held-out mean of one reward or scorer; NaN if no image has a score."""
        return self.stats.means[best_by]


def alarms(base: VersionStats, now: VersionStats, scorers: list[str], settings: GuardTable) -> Iterator[Alarm]:
    """Compare a version with the pretrained model.

    Args:
        base: the pretrained model's statistics.
        now: those of the version to judge.
        scorers: names of the scorers that are not trained on.
        settings: `[guard]`, with the limits.
    """
    for name in scorers:
        yield from _fallen(name, base, now, settings)
    before, after = base.images["dark_share"], now.images["dark_share"]
    if after > before + settings.dark_share:
        says = f"{after:.0%} of the pixels are nearly black, and {before:.0%} were"
        yield Alarm("dark_share", f"{says}: {settings.dark_share:.0%} more are allowed")
    for name in SHARES:
        # An evaluation by an earlier version of the program may lack a statistic.
        before, after = base.images.get(name, math.nan), now.images.get(name, math.nan)
        limit = getattr(settings, name)
        if after < limit * before:  # false if either is NaN
            left = f"{after / before:.0%} of it is left, under {limit:.0%}"
            yield Alarm(name, f"{name} is {after:.3g} and was {before:.3g}: {left}")
    best = now.saturation
    if settings.saturation and best is not None and best >= settings.saturation > (base.saturation or 0.0):
        says = f"{best:.0%} of the images have the best possible reward, and {base.saturation or 0.0:.0%} had"
        yield Alarm("saturation", f"{says}: from {settings.saturation:.0%} on, little is left to learn from groups")
    kl, limit = now.kl_reference_nats, settings.max_kl_nats
    if kl is not None and limit is not None and kl > limit:
        yield Alarm("kl", f"the policy is {kl:.3g} nats a step from the pretrained model, over {limit:g}")


def _fallen(name: str, base: VersionStats, now: VersionStats, settings: GuardTable) -> Iterator[Alarm]:
    """Yield an alarm if a scorer fell significantly, by over `guard.max_scorer_drop` standard deviations."""
    change = paired_change(base.scores[name], now.scores[name])
    if change is None or change.change >= 0:
        return
    certain = change.errors is None or -change.errors >= settings.certainty
    if certain and -change.change > settings.max_scorer_drop * change.spread:
        deviations = f"{-change.change / change.spread:.2g}" if change.spread else "more than any"
        fell = f"{name} fell from {change.before:.3g} to {change.after:.3g}, by {deviations} standard deviations"
        yield Alarm(name, f"{fell} of its scores before; {settings.max_scorer_drop:g} are allowed")


def best_version(judged: list[JudgedVersion], best_by: str) -> int | None:
    """Return the version with the highest score among those without an alarm; None if there is none.

    The first of several equal versions is chosen.
    """
    sound = [each for each in judged if not each.alarms and math.isfinite(each.score(best_by))]
    return max(sound, key=lambda each: (each.score(best_by), -each.policy_version)).policy_version if sound else None


def is_over(judged: list[JudgedVersion], settings: GuardTable) -> bool:
    """Return whether the guard ends the run: the last `guard.patience` evaluations all had an alarm."""
    last = judged[-settings.patience :]
    return settings.on_alarm != "continue" and len(last) == settings.patience and all(each.alarms for each in last)

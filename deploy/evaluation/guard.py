"""Guard: whether what was learned fools the reward. Pure functions from what two evaluations saw to alarms.

A reward that rises tells nothing of that (Goodhart's law; for DDPO: Black et al. 2023, section 6.3). So what nobody trains on is
held against the pretrained model, on the same prompts and noise.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.metrics.statistics import paired_change
from ray_ddpo.common.recipe.tables import GuardTable

LEFT = ("sharpness", "entropy", "diversity")  # statistics of which a share must be left, and their keys in the recipe


@dataclass(frozen=True)
class Look:
    """What an evaluation saw of one version's images."""

    scores: dict[str, Float[np.ndarray, "N"]]  # by reward and scorer, NaN where an image has none
    images: dict[str, float]  # means over the images: dark_share, and those of LEFT
    kl_reference_nats: float | None = None  # of a step, to the pretrained model; None: not measured


@dataclass(frozen=True)
class Alarm:
    """A finding: what it is about, and a sentence with its numbers."""

    about: str
    says: str


def alarms(base: Look, now: Look, scorers: list[str], settings: GuardTable) -> list[Alarm]:
    """What has gone wrong since the pretrained model; `scorers` are those that nobody trains on."""
    found = [*_fallen(base, now, scorers, settings), *_dark(base, now, settings), *_lost(base, now, settings)]
    kl, limit = now.kl_reference_nats, settings.max_kl_nats
    if kl is not None and limit is not None and kl > limit:
        found.append(Alarm("kl", f"the policy is {kl:.3g} nats a step from the pretrained model, over {limit:g}"))
    return found


def _fallen(base: Look, now: Look, scorers: list[str], settings: GuardTable) -> Iterator[Alarm]:
    for name in scorers:
        change = paired_change(base.scores[name], now.scores[name])
        if change is None or change.change >= 0:
            continue
        certain = change.errors is None or -change.errors >= settings.certainty
        if certain and -change.change > settings.scorer_fall * change.spread:
            deviations = f"{-change.change / change.spread:.2g}" if change.spread else "more than any"
            fell = f"{name} fell from {change.before:.3g} to {change.after:.3g}"
            yield Alarm(
                name,
                f"{fell}, by {deviations} standard deviations of its scores before; {settings.scorer_fall:g} are allowed",
            )


def _dark(base: Look, now: Look, settings: GuardTable) -> Iterator[Alarm]:
    before, after = base.images["dark_share"], now.images["dark_share"]
    if after > before + settings.dark_share:
        yield Alarm(
            "dark_share",
            f"{after:.0%} of the pixels are nearly black, and {before:.0%} were: {settings.dark_share:.0%} more are allowed",
        )


def _lost(base: Look, now: Look, settings: GuardTable) -> Iterator[Alarm]:
    for name in LEFT:
        before, after, limit = base.images[name], now.images[name], getattr(settings, name)
        if after < limit * before:  # never where one of them is NaN
            yield Alarm(
                name,
                f"{name} is {after:.3g} and was {before:.3g}: {after / before:.0%} of it is left, under {limit:.0%}",
            )


@dataclass(frozen=True)
class Judged:
    """What became of one evaluated version."""

    policy_version: int
    score: float  # held-out mean of what `guard.best_by` names; NaN: there is none
    alarms: tuple[Alarm, ...]


def best_version(judged: list[Judged]) -> int | None:
    """The version with the highest score among those without an alarm, the first of equals; None where none is left."""
    sound = [each for each in judged if not each.alarms and math.isfinite(each.score)]
    return max(sound, key=lambda each: (each.score, -each.policy_version)).policy_version if sound else None


def is_over(judged: list[Judged], settings: GuardTable) -> bool:
    """Whether the last `patience` evaluations all had an alarm, and the recipe wants the run to end then."""
    last = judged[-settings.patience :]
    return settings.on_alarm != "continue" and len(last) == settings.patience and all(each.alarms for each in last)

"""The summary in words: what changed, how sure that is, and whether the reward may have been fooled."""

import math

from ray_ddpo.common.metrics.diagnoses import bottleneck
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import reward_pools
from ray_ddpo.deploy.commands.report.charts import column
from ray_ddpo.deploy.commands.report.numbers import NARROW, duration, number, percent, signed, tick
from ray_ddpo.deploy.commands.report.scores import Score
from ray_ddpo.deploy.evaluation.held_out import JOINED

Metrics = dict[str, float]
CERTAIN, LIKELY = 3.0, 2.0  # standard errors


def summary_in_words(found: list[Score], rounds: list[Metrics]) -> list[str]:
    """Sentences, the most important first."""
    reward = found[0]
    sentences = [_verdict(reward), _images(reward)]
    sentences += [_of_score(score) for score in found[1:]]
    sentences += [_floor(score) for score in found if score.floor is not None]
    sentences += _suspicion(reward, [score for score in found if not score.trained_on])
    return [*sentences, _training(rounds), *_dropped(rounds)]


def what_waits(rounds: list[Metrics], recipe: Recipe) -> str:
    """One sentence that names the bottleneck."""
    scoring = sum(pool.table.count for pool in reward_pools(recipe))
    return bottleneck(rounds, recipe.max_policy_lag, recipe.samplers.count, scoring)


def _verdict(reward: Score) -> str:
    name = "" if reward.name == JOINED else f" {reward.name}"
    return (
        f"On {reward.images} held-out images, sampled with the same prompts and the same noise, the reward{name} "
        f"{_moved(reward)}: {_certainty(reward)}."
    )


def _moved(score: Score) -> str:
    if not score.change:
        return f"stayed at {number(score.before)}"
    verb = "rose" if score.change > 0 else "fell"
    how_much = f" ({signed(score.percent)}{NARROW}%)" if score.percent is not None else ""
    return f"{verb} from {number(score.before)} to {number(score.after)}{how_much}"


def _certainty(score: Score) -> str:
    if score.errors is None:
        return "every image changed alike" if score.change else "no image changed"
    size = f"{signed(score.errors)} paired standard errors"
    if abs(score.errors) >= CERTAIN:
        return f"{size}, more than chance"
    if abs(score.errors) >= LIKELY:
        return f"{size}, probably more than chance"
    return f"{size}, which cannot be told from chance"


def _images(reward: Score) -> str:
    same = reward.images - reward.higher - reward.lower
    equal = f", {same} the same" if same else ""
    return f"{reward.higher} images have a higher reward than before, {reward.lower} a lower one{equal}."


def _of_score(score: Score) -> str:
    part = "" if score.trained_on else ", which was not trained on,"
    kept = f" Of the images with 1 before, {percent(score.kept)} still have it." if score.kept is not None else ""
    return f"{score.name}{part} {_moved(score)}: {_certainty(score)}.{kept}"


def _floor(score: Score) -> str:
    return (
        f"{percent(score.below_after)} of the images are below the floor {tick(score.floor)} of {score.name}; "
        f"{percent(score.below_before)} were before."
    )


def _suspicion(reward: Score, looked_at: list[Score]) -> list[str]:
    """A reward that rose while what nobody trained on fell."""
    fell = [score.name for score in looked_at if score.errors is not None and score.errors <= -LIKELY]
    if not fell or (reward.errors or 0) < LIKELY:
        return []
    return [f"The reward rose while {' and '.join(fell)} fell: it may have been fooled, so look at the images."]


def _training(rounds: list[Metrics]) -> str:
    images, seconds, reward = (column(rounds, name) for name in ("images", "seconds/round", "reward/mean"))
    done = f"The run sampled {images.sum():,.0f} images in {_rounds(len(rounds))} and {duration(seconds.sum())}"
    known = reward[[math.isfinite(value) for value in reward]]
    if len(known) < 2:
        return f"{done}."
    return f"{done}; their mean reward was {number(known[0])} in the first round and {number(known[-1])} in the last."


def _rounds(count: int) -> str:
    return "one round" if count == 1 else f"{count} rounds"


def _dropped(rounds: list[Metrics]) -> list[str]:
    count = column(rounds, "images_dropped").sum()
    if not count:
        return []
    return [f"{count:.0f} of these images could not be scored, or one of their group; nothing was learned from them."]

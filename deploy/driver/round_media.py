"""Media of a round for trackers: first images with their rewards, a table of prompts, and histograms."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.trackers.media import CaptionedImage, Media, ShownTable
from ray_ddpo.common.trajectory import ImageBatch, Rollout, TrainBatch

PANEL = "round"
COLUMNS = ("prompt", "images", "reward_mean", "reward_std", "advantage_mean", "advantage_std")


def first_images(
    rollouts: list[Rollout], count: int, fetch: Callable[[Rollout], ImageBatch | None]
) -> dict[int, CaptionedImage]:
    """Return a round's first `count` images, or clips, by their number, without captions.

    Only their tasks are fetched. Lost images are left out.
    """
    found: dict[int, CaptionedImage] = {}
    first = 0
    for rollout in rollouts:
        if first >= count:
            break
        images = fetch(rollout)
        if images is not None:
            shown = enumerate(images.pixels[: count - first])
            found |= {first + row: CaptionedImage(each.copy(), frame_rate=images.frame_rate) for row, each in shown}
        first += len(rollout.report.task.seeds)
    return found


def round_media(
    batch: TrainBatch,
    rollouts: list[Rollout],
    weights: dict[str, float],
    images: dict[int, CaptionedImage],
    log_ratios: Float[np.ndarray, "N"],
) -> Media:
    """Return the media of a round. Dropped images are left out of table and histograms.

    Args:
        batch: with the advantages.
        rollouts: with prompts and scores.
        weights: by reward name.
        images: the images to show, by their number in the round.
        log_ratios: for a histogram.
    """
    prompts = [prompt.key for rollout in rollouts for prompt in rollout.report.task.prompts]
    scores = {name: np.concatenate([rollout.scores.rewards[name] for rollout in rollouts]) for name in weights}
    parts = [weight * scores[name].astype(np.float64) for name, weight in weights.items()]
    reward = np.sum(parts, axis=0)
    kept = np.setdiff1d(np.arange(len(prompts)), batch.dropped)
    histograms = {"reward": reward[kept], "advantage": batch.advantages[kept], "log_ratio": log_ratios}
    if len(scores) > 1:
        histograms |= {f"reward/{name}": values[kept] for name, values in scores.items()}
    shown = tuple(
        replace(each, caption=_caption(prompts[image], reward[image], batch.advantages[image]))
        for image, each in images.items()
    )
    table = ShownTable(COLUMNS, _rows(np.array(prompts)[kept], reward[kept], batch.advantages[kept]))
    return Media(batch.round, {PANEL: shown} if shown else {}, {PANEL: table}, histograms)


def _caption(prompt: str, reward: float, advantage: float) -> str:
    if np.isnan(advantage):
        return f"{prompt}: dropped"
    return f"{prompt}: reward {reward:.4g}, advantage {advantage:+.3g}"


def _rows(
    prompts: np.ndarray, reward: Float[np.ndarray, "N"], advantages: Float[np.ndarray, "N"]
) -> tuple[tuple[str | int | float, ...], ...]:
    """Return one row a prompt, as COLUMNS has it."""
    rows = []
    for prompt in np.unique(prompts):
        rewards, of_prompt = reward[prompts == prompt], advantages[prompts == prompt]
        stats = (rewards.mean(), rewards.std(), of_prompt.mean(), of_prompt.std())
        rows.append((str(prompt), len(rewards), *(float(value) for value in stats)))
    return tuple(rows)

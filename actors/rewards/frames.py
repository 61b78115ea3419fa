"""Score clips with a reward of images: the scores of frames become one score a clip."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import LoadedReward, Reward, RewardMistake
from ray_ddpo.common.clips import Pixels, are_clips, equally_distant
from ray_ddpo.common.recipe.tables import RewardTable


@dataclass(frozen=True)
class FrameScoring:
    """Which frames of a clip are scored, and how their scores become one."""

    kind: Literal["mean", "minimum", "last"] = "mean"
    count: int | None = None  # of the frames that are scored; None: all

    @classmethod
    def of(cls, table: RewardTable) -> "FrameScoring":
        """Return the settings of a reward's table."""
        return cls(table.frames, table.scored_frames)

    def chosen(self, num_frames: int) -> list[int]:
        """Return the frames that are scored, in order."""
        if self.kind == "last":
            return [num_frames - 1]
        return equally_distant(num_frames, self.count or num_frames)

    def joined(self, scores: Float[np.ndarray, "B K"]) -> Float[np.ndarray, "B"]:
        """Return one score a clip, NaN if the score of a frame is not finite."""
        joined = scores.min(axis=1) if self.kind == "minimum" else scores.mean(axis=1, dtype=np.float64)
        return np.where(np.isfinite(scores).all(axis=1), joined, np.nan).astype(np.float32)


def on_clips(
    loaded: LoadedReward, reward: Reward, who: str, scoring: FrameScoring, images_at_once: int
) -> LoadedReward:
    """Return a function that scores images and clips alike.

    A reward of images gets frames as images. If it is independent of the batch, a batch has up to `images_at_once`
    frames of any clips, so memory does not grow with a clip's length. Otherwise it has one frame of every clip, so that
    a batch has one image of each prompt, as in a run on images.

    Args:
        loaded: the reward, under its contract.
        reward: its settings.
        who: the reward's name in error messages.
        scoring: how scores of frames become one.
        images_at_once: the batch size of the worker's table.
    """

    def of_clips(images: Pixels, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
        if not are_clips(images):
            raise RewardMistake(
                f"{who} scores clips, and it was given images: take a reward of images, or a service's with "
                "clips = true"
            )
        return loaded(images, prompts, metadata)

    def of_frames(images: Pixels, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
        if not are_clips(images):
            return loaded(images, prompts, metadata)
        chosen = scoring.chosen(images.shape[1])
        places = [(row, frame) for frame in chosen for row in range(len(images))]
        at_once = images_at_once if reward.independent_of_batch else len(images)
        scores = []
        for start in range(0, len(places), at_once):
            rows, frames = zip(*places[start : start + at_once], strict=True)
            texts, about = [prompts[row] for row in rows], [metadata[row] for row in rows]
            scores.append(loaded(images[list(rows), list(frames)], texts, about))
        return scoring.joined(np.concatenate(scores).reshape(len(chosen), len(images)).T)

    return of_clips if reward.takes_clips else of_frames

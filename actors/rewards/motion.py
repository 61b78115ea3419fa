"""Score how much a clip moves: the mean difference of neighboring frames."""

from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import Clips, LoadedReward, Reward
from ray_ddpo.common.clips import Clip


def motion(clip: Clip) -> float:
    """Return the mean of |frame t + 1 − frame t| / 255 over neighboring frames, pixels and channels."""
    if len(clip) < 2:
        raise ValueError(f"motion is of neighboring frames, and the clip has {len(clip)}: give at least 2")
    # Integers, whose sum is exact in any order. One pair at a time, so that memory does not grow with the frames.
    pairs = zip(clip[1:], clip[:-1], strict=True)
    total = sum(int(np.abs(after.astype(np.int16) - before).sum(dtype=np.int64)) for after, before in pairs)
    return total / (255 * clip[1:].size)


class Motion(Reward):
    """Mean absolute difference of a clip's neighboring frames: 0 a still, 1 black and white in turn. A faster clip has more.

    With a negative `weight`, stillness is rewarded.
    """

    @property
    def independent_of_batch(self) -> bool:
        return True

    @property
    def takes_clips(self) -> bool:
        return True

    @property
    def score_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def load(self, device: str) -> LoadedReward:
        def score(clips: Clips, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return np.array([motion(clip) for clip in clips], dtype=np.float32)

        return score

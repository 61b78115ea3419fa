"""Score how much of an input image an edit leaves as it was, outside the prompt's mask."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.input_images import read_inputs
from ray_ddpo.common.prompts import Prompt, refuse_without_inputs


def preserved(
    image: UInt8[np.ndarray, "H W 3"], before: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"]
) -> float:
    """Return 1 − the mean of |image − before| / 255 over channels and pixels outside the mask; 1 if there are none."""
    outside = ~mask
    if not outside.any():
        return 1.0
    # Integers, whose sum is exact in any order.
    differences = np.abs(image[outside].astype(np.int64) - before[outside].astype(np.int64))
    return 1.0 - int(differences.sum()) / (255 * differences.size)


class EditPreservation(Reward):
    """Similarity of the image to its prompt's input image outside the mask, or everywhere without a mask: 1 if equal."""

    @property
    def independent_of_batch(self) -> bool:
        return True

    @property
    def score_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        refuse_without_inputs(prompts, "the reward edit_preservation")

    def load(self, device: str) -> LoadedReward:
        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            inputs = read_inputs(metadata, images.shape[1:3])
            rows = zip(images, inputs.pixels, inputs.masks, strict=True)
            return np.array([preserved(*row) for row in rows], dtype=np.float32)

        return score

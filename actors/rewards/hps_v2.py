"""HPS v2.1: human preference, by an open_clip ViT-H/14 that was tuned on preferences (Wu et al. 2023)."""

from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.differentiable_reward import DifferentiableReward
from ray_ddpo.common.image_models.clip_towers import ClipTowers, clip_towers
from ray_ddpo.common.image_models.open_clip_weights import load_open_clip
from ray_ddpo.common.model_files.model_hub import Weights, cannot_load, file_from_hub, file_of
from ray_ddpo.common.model_files.pretrained import TOKENIZER_FILE, Precision, torch_dtype, weight_bytes

REPOSITORY, CHECKPOINT = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_H_14_PARAMETERS = 986_109_441  # both towers, their projections and the logit scale
HEADS = 16  # attention heads of both towers of a ViT-H/14, which the shapes of weights do not tell


class HpsV2(Reward):
    """Human Preference Score v2: the cosine between the embeddings of image and prompt, mostly 0.2 to 0.35.

    The score is the paper's, not multiplied by 100.
    """

    checkpoint: str | None = None
    """File of the weights. By default v2.1 from the hub."""
    tokenizer: str = TOKENIZER
    """Tokenizer: a folder or a hub name."""
    dtype: Precision = "auto"
    """Dtype of CLIP. `auto`: float16 on a GPU, float32 on the CPU."""

    @property
    def memory_bytes(self) -> int:
        return weight_bytes(VIT_H_14_PARAMETERS, self.dtype)

    def needs(self) -> tuple[Weights, ...]:
        return (
            file_of(self.checkpoint, REPOSITORY, CHECKPOINT, "reward.checkpoint"),
            Weights(self.tokenizer, (TOKENIZER_FILE,), "reward.tokenizer"),
        )

    def load(self, device: str) -> LoadedReward:
        towers = self._load_towers(device)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return towers.cosines(images, prompts)

        return score

    def load_differentiable(self, device: str) -> DifferentiableReward:
        towers = self._load_towers(device)
        return lambda pixels, prompts, metadata: towers.cosines_with_gradient(pixels, prompts)

    def _load_towers(self, device: str) -> ClipTowers:
        checkpoint, tokenizer = self.needs()
        path = self.checkpoint or file_from_hub(REPOSITORY, CHECKPOINT, cannot_load(checkpoint))
        model = load_open_clip(path, HEADS, torch_dtype(self.dtype, device))
        # The paper's code pads an image that is not square with black, and does not crop it.
        return clip_towers(model, tokenizer, device, whole=True)

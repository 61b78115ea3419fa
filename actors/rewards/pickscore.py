"""PickScore: human preference for a prompt, by a CLIP ViT-H/14 tuned on choices (Kirstain et al. 2023)."""

from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.differentiable_reward import DifferentiableReward
from ray_ddpo.common.image_models.clip_towers import ClipTowers, load_clip
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.model_files.pretrained import MODEL_FILES, TOKENIZER_FILE, Precision, torch_dtype, weight_bytes

CLIP = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the model's repository is used for weights only
VIT_H_14_PARAMETERS = 986_109_441  # both towers, their projections and the logit scale


class PickScore(Reward):
    """PickScore: CLIP's logit of image and prompt, mostly 18 to 24.

    The exponential of the difference of two images' scores is the odds that people pick the first.
    """

    clip: str = CLIP
    """CLIP model: a folder or a hub name."""
    tokenizer: str = TOKENIZER
    """Tokenizer: a folder or a hub name."""
    dtype: Precision = "auto"
    """Dtype of CLIP. `auto`: float16 on a GPU, float32 on the CPU."""

    @property
    def memory_bytes(self) -> int:
        return weight_bytes(VIT_H_14_PARAMETERS, self.dtype)

    def needs(self) -> tuple[Weights, ...]:
        return (
            Weights(self.clip, MODEL_FILES, "reward.clip"),
            Weights(self.tokenizer, (TOKENIZER_FILE,), "reward.tokenizer"),
        )

    def load(self, device: str) -> LoadedReward:
        towers = self._load_towers(device)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return (towers.logit_scale * towers.cosines(images, prompts)).astype(np.float32)

        return score

    def load_differentiable(self, device: str) -> DifferentiableReward:
        towers = self._load_towers(device)
        return lambda pixels, prompts, metadata: towers.logit_scale * towers.cosines_with_gradient(pixels, prompts)

    def _load_towers(self, device: str) -> ClipTowers:
        clip, tokenizer = self.needs()
        return load_clip(clip, tokenizer, device, torch_dtype(self.dtype, device))

"""CLIPScore: similarity of image and prompt (Hessel et al. 2021)."""

from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.differentiable_reward import DifferentiableReward
from ray_ddpo.common.image_models.clip_towers import ClipTowers, load_clip
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.model_files.pretrained import MODEL_FILES, TOKENIZER_FILE, Precision, torch_dtype, weight_bytes

CLIP = "openai/clip-vit-large-patch14"
VIT_L_14_PARAMETERS = 427_616_513  # both towers, their projections and the logit scale


class ClipScore(Reward):
    """CLIPScore: 100 times the cosine between the embeddings of image and prompt, mostly 15 to 35.

    The scale is that of torchmetrics. The paper's is 2.5 times the cosine, a fortieth of it. Both clip the score at 0.
    This reward does not, so that below 0 a worse image still scores less and the learning signal does not vanish.
    """

    clip: str = CLIP
    """CLIP model: a folder or a hub name."""
    dtype: Precision = "auto"
    """Dtype of CLIP. `auto`: float16 on a GPU, float32 on the CPU."""

    @property
    def memory_bytes(self) -> int:
        return weight_bytes(VIT_L_14_PARAMETERS, self.dtype)

    def needs(self) -> tuple[Weights, ...]:
        return (Weights(self.clip, (*MODEL_FILES, TOKENIZER_FILE), "reward.clip"),)

    def load(self, device: str) -> LoadedReward:
        towers = self._load_towers(device)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return 100 * towers.cosines(images, prompts)

        return score

    def load_differentiable(self, device: str) -> DifferentiableReward:
        towers = self._load_towers(device)
        return lambda pixels, prompts, metadata: 100 * towers.cosines_with_gradient(pixels, prompts)

    def _load_towers(self, device: str) -> ClipTowers:
        (clip,) = self.needs()
        return load_clip(clip, clip, device, torch_dtype(self.dtype, device))

"""HPSv3: human preference, by a Qwen2-VL-7B that was tuned on preferences (Ma et al. 2025, arXiv 2508.03789)."""

from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.model_files.model_hub import Weights, cannot_load, file_from_hub, file_of
from ray_ddpo.common.model_files.pretrained import TOKENIZER_FILE, Precision, torch_dtype, weight_bytes

REPOSITORY, CHECKPOINT = "MizzenAI/HPSv3", "HPSv3.safetensors"
MODEL = "Qwen/Qwen2-VL-7B-Instruct"
PARAMETERS = 7_748_610_610  # without the language head


class HpsV3(Reward):
    """Human Preference Score v3: an unbounded number, whose differences count. About 0 to 15 for usual images."""

    checkpoint: str | None = None
    """File of the weights. By default that of the hub."""
    model: str = MODEL
    """Qwen2-VL whose configuration and tokenizer are read: a folder or a hub name. Its own weights are not needed."""
    dtype: Precision = "bfloat16"
    """Dtype of the backbone. The head is in float32."""

    @property
    def memory_bytes(self) -> int:
        return weight_bytes(PARAMETERS, self.dtype)

    def needs(self) -> tuple[Weights, ...]:
        return (
            file_of(self.checkpoint, REPOSITORY, CHECKPOINT, "reward.checkpoint"),
            Weights(self.model, ("config.json", TOKENIZER_FILE), "reward.model"),
        )

    def load(self, device: str) -> LoadedReward:
        from ray_ddpo.common.image_models.hps_v3_network import load_hps_v3

        checkpoint, model = self.needs()
        path = self.checkpoint or file_from_hub(REPOSITORY, CHECKPOINT, cannot_load(checkpoint))
        network = load_hps_v3(path, model, torch_dtype(self.dtype, device), device)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return network.scores(images, prompts).cpu().numpy()

        return score

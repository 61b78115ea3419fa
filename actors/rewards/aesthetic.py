"""Aesthetic rating: CLIP ViT-L/14's embedding and a head that was fitted on ratings (DDPO, section 5.2)."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.differentiable_reward import DifferentiableReward
from ray_ddpo.common.image_models.aesthetic_head import AestheticHead, read_head
from ray_ddpo.common.image_models.clip_towers import EmbedImages, ImageEmbedder, load_image_embedder
from ray_ddpo.common.model_files.model_hub import Weights, file_from_hub, file_of
from ray_ddpo.common.model_files.pretrained import MODEL_FILES, Precision, torch_dtype, weight_bytes

CLIP = "openai/clip-vit-large-patch14"
HEAD_REPOSITORY, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
VIT_L_14_PARAMETERS = 303_966_208  # the image tower with its projection
WANTED = (
    f"the aesthetic reward needs CLIP (config.json and model.safetensors of the hub's {CLIP}) and a head "
    f"({HEAD_FILE} of the hub's {HEAD_REPOSITORY}); where the hub cannot be reached, copy them to this machine, and "
    "set reward.clip to the folder of the first and reward.head to the path of the second"
)


class Aesthetic(Reward):
    """Aesthetic predictor on CLIP embeddings: a rating of about 1 to 10."""

    clip: str = CLIP
    """CLIP model: a folder or a hub name."""
    head: str | None = None
    """File of the head's weights. By default the head of the DDPO paper, from the hub."""
    dtype: Precision = "auto"
    """Dtype of CLIP. `auto`: float16 on a GPU, float32 on the CPU."""

    @property
    def memory_bytes(self) -> int:
        return weight_bytes(VIT_L_14_PARAMETERS, self.dtype)

    def needs(self) -> tuple[Weights, ...]:
        return (
            Weights(self.clip, MODEL_FILES, "reward.clip"),
            file_of(self.head, HEAD_REPOSITORY, HEAD_FILE, "reward.head"),
        )

    def load(self, device: str) -> LoadedReward:
        embedder, head = self._load_parts(device)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            # Copy, because images in Ray's object store are read-only, and torch warns about sharing them.
            pixels = torch.from_numpy(np.array(images)).to(device)
            return head(embedder.embed(pixels)).cpu().numpy()

        return score

    def load_differentiable(self, device: str) -> DifferentiableReward:
        embedder, head = self._load_parts(device)
        return lambda pixels, prompts, metadata: head(embedder.embed_with_gradient(pixels))

    def _load_parts(self, device: str) -> tuple[ImageEmbedder, AestheticHead]:
        """Load CLIP's image tower and the head."""
        missing = f"reward.head is not given, and its weights cannot be had: {WANTED}"
        head = read_head(self.head or file_from_hub(HEAD_REPOSITORY, HEAD_FILE, missing)).to(device)
        embedder = _load_tower(self.clip, device, torch_dtype(self.dtype, device))
        if embedder.dimension != head.dimension:
            raise ValueError(
                f"reward.clip {self.clip!r} gives embeddings of {embedder.dimension} numbers, "
                f"and reward.head {self.head or HEAD_FILE!r} takes {head.dimension}: they must be of one kind"
            )
        return embedder, head


def load_embedder(clip: str, device: str, dtype: torch.dtype) -> tuple[EmbedImages, int]:
    """Load the function from images to CLIP's projected embeddings, of L2 norm 1 in float32, and their dimension."""
    embedder = _load_tower(clip, device, dtype)
    return embedder.embed, embedder.dimension


def _load_tower(clip: str, device: str, dtype: torch.dtype) -> ImageEmbedder:
    return load_image_embedder(clip, device, dtype, f"reward.clip is {clip!r}, which cannot be loaded: {WANTED}")

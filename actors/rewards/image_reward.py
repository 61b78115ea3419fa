"""ImageReward: human preference for an image and its prompt, by a BLIP tuned on rankings (Xu et al. 2023)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.differentiable_reward import DifferentiableReward
from ray_ddpo.common.image_models.aesthetic_head import AestheticHead, layers_in_order
from ray_ddpo.common.image_models.blip_weights import load_blip, without_prefix
from ray_ddpo.common.image_models.clip_preprocessing import clip_pixels
from ray_ddpo.common.image_models.differentiable_preprocessing import clip_pixels_with_gradient
from ray_ddpo.common.image_models.weight_file import named_weights
from ray_ddpo.common.model_files.model_hub import Weights, cannot_load, file_from_hub, file_of
from ray_ddpo.common.model_files.pretrained import TOKENIZER_FILE, Precision, read_tokenizer, torch_dtype, weight_bytes

REPOSITORY, CHECKPOINT = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
PARAMETERS = 445_278_720  # both towers: ViT-L/16, and BERT with cross-attention
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the paper's raw scores
MAX_TOKENS = 35
ADDED_WORDS = 2  # [DEC] and [ENC], which BLIP adds to BERT's vocabulary and no prompt has


class ImageReward(Reward):
    """ImageReward: about -2.3 to 2, with mean 0 and standard deviation 1 over the paper's images.

    Prompts are truncated at 35 tokens, as in the paper's code.
    """

    checkpoint: str | None = None
    """File of the weights. By default those on the hub."""
    tokenizer: str = TOKENIZER
    """Tokenizer: a folder or a hub name."""
    dtype: Precision = "auto"
    """Dtype of BLIP. `auto`: float16 on a GPU, float32 on the CPU."""

    @property
    def memory_bytes(self) -> int:
        return weight_bytes(PARAMETERS, self.dtype)

    def needs(self) -> tuple[Weights, ...]:
        return (
            file_of(self.checkpoint, REPOSITORY, CHECKPOINT, "reward.checkpoint"),
            Weights(self.tokenizer, (TOKENIZER_FILE,), "reward.tokenizer"),
        )

    def load(self, device: str) -> LoadedReward:
        scored, side = self._load_model(device)

        @torch.no_grad()
        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return scored(clip_pixels(torch.from_numpy(np.array(images)).to(device), side), prompts).cpu().numpy()

        return score

    def load_differentiable(self, device: str) -> DifferentiableReward:
        scored, side = self._load_model(device)
        return lambda pixels, prompts, metadata: scored(clip_pixels_with_gradient(pixels, side), prompts)

    def _load_model(self, device: str) -> tuple[Callable[[torch.Tensor, list[str]], torch.Tensor], int]:
        """Return the function from preprocessed images and prompts to scores, and the side of its images."""
        checkpoint, tokenizer = self.needs()
        path = self.checkpoint or file_from_hub(REPOSITORY, CHECKPOINT, cannot_load(checkpoint))
        state = named_weights(path, "the checkpoint", ".pt")
        missing = f"the checkpoint {path} has not the weights of ImageReward"
        towers = load_blip(without_prefix(state, "blip."), torch_dtype(self.dtype, device), missing)
        images_tower, texts_tower = (tower.to(device).requires_grad_(False) for tower in towers)
        layers = layers_in_order(without_prefix(state, "mlp."))
        if layers is None or layers[0][0].shape[1] != texts_tower.config.hidden_size:
            raise ValueError(f"{missing} (its head, mlp.layers.0, 2, 4, 6 and 7, lacks or does not fit)")
        head, tokens = AestheticHead(layers).to(device), _tokenizer_for(texts_tower, tokenizer)

        def scored(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            seen = images_tower(pixel_values=pixels.to(images_tower.dtype)).last_hidden_state
            asked = tokens(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(
                device
            )
            read = texts_tower(asked["input_ids"], asked["attention_mask"], encoder_hidden_states=seen)
            return (head(read.last_hidden_state[:, 0].float()) - MEAN) / STD

        return scored, images_tower.config.image_size


def _tokenizer_for(texts_tower: Any, tokenizer: Weights) -> Any:
    """Load a tokenizer, and raise ValueError if its vocabulary does not fit the text tower."""
    from transformers import BertTokenizer

    tokens, words = read_tokenizer(BertTokenizer, tokenizer), texts_tower.config.vocab_size
    if len(tokens) not in (words, words - ADDED_WORDS):
        raise ValueError(
            f"{tokenizer.key} is {tokenizer.source!r}, whose tokenizer has {len(tokens)} tokens: ImageReward's text "
            f"tower takes {words}, of which {ADDED_WORDS} are not BERT's"
        )
    return tokens

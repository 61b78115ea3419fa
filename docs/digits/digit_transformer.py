"""A small transformer that predicts the velocity of a digit's noised pixels, given timestep and digit."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm modulated by timestep and digit (Peebles & Xie 2023)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 4 * width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Float[Tensor, "B N D"], condition: Float[Tensor, "B D"]) -> Float[Tensor, "B N D"]:
        shift, scale, second_shift, second_scale = self.modulation(condition).unsqueeze(1).chunk(4, dim=-1)
        inner = self.norm(tokens) * (1 + scale) + shift
        heads = (
            layer(inner).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        tokens = tokens + self.to_out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        inner = self.norm(tokens) * (1 + second_scale) + second_shift
        return tokens + self.narrow(F.gelu(self.widen(inner)))


class DigitTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A transformer over patches. The first two base classes give files in diffusers' format, the third adapters."""

    @register_to_config
    def __init__(
        self, size: int = 16, patch: int = 4, width: int = 64, num_heads: int = 4, num_blocks: int = 4
    ) -> None:
        super().__init__()
        self.patches_in, self.patches_out = nn.Linear(patch**2, width), nn.Linear(width, patch**2)
        self.places = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.digit = nn.Linear(10, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, latents: Float[Tensor, "B 1 S S"], timesteps: Float[Tensor, "B"], digit: Float[Tensor, "B 10"]
    ) -> Float[Tensor, "B 1 S S"]:
        """Return the velocity ε − x0 at `timesteps` from 1000 (pure noise) to 0.

        A zero row in `digit` means any digit.
        """
        patch, side = self.config["patch"], self.config["size"] // self.config["patch"]
        condition = F.silu(self.time(get_timestep_embedding(timesteps, self.config["width"])) + self.digit(digit))
        tokens = self.patches_in(F.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)) + self.places
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.patches_out(self.norm(tokens)).transpose(1, 2).unflatten(2, (side, side))
        return F.pixel_shuffle(patches, patch)

"""Pad the states of a prompt to one length with a mask, so that a network's shapes do not depend on its batch."""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.policy import Conditioning


class MaskedTextPolicy(DiffusersPolicy):
    """A loaded pipeline whose network reads one text encoder's states with a mask."""

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        rows = self._padded(prompt)
        if not with_negative or self.branches == 1:
            return rows
        negative = self.default_negative if self.negative_prompt is None else self.negative_prompt
        return with_negative_rows(rows, self._padded(negative or ""))

    @abstractmethod
    def _padded(self, text: str) -> Conditioning:
        """Return the states and the mask of a text, as `masked_rows` does."""


def masked_rows(embeds: Float[Tensor, "1 L D"], length: int) -> Conditioning:
    """Return a prompt's states with zeros behind them, and a mask that is 1 at its tokens and 0 behind."""
    behind = length - embeds.shape[1]
    mask = torch.ones(1, embeds.shape[1], device=embeds.device)
    return {"prompt_embeds": pad(embeds, (0, 0, 0, behind)), "prompt_embeds_mask": pad(mask, (0, behind))}


def with_negative_rows(rows: Conditioning, negative: Conditioning) -> Conditioning:
    """Return a prompt's rows with those of the negative prompt, which are named `negative_…`."""
    return rows | {f"negative_{name}": value for name, value in negative.items()}

"""Families whose network reads the tokens of several input images behind those of the latents."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from ray_ddpo.common.diffusion.editing_policy import EditingPolicy
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.policy import Conditioning

LATENTS = "input_latents"  # [N, C, H, W] a row: N images, the last of which may be fillers
FILLERS = "input_fillers"  # [1] a row: how many are fillers, so that zeros stand for a row without any


def input_shapes(latent_shape: tuple[int, ...], most: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one prompt's rows of at most `most` input images."""
    return {LATENTS: (most, *latent_shape)} | ({FILLERS: (1,)} if most > 1 else {})


class SeveralInputsPolicy(EditingPolicy):
    """A loaded pipeline that reads one or more input images a prompt. Rows have the shape of the most images."""

    def _encode_inputs(
        self, images: list[Float[Tensor, "1 3 H2 W2"]], mask: Float[Tensor, "1 1 H2 W2"]
    ) -> Conditioning:
        """Return the latents of all images and, if the family may read several, how many are fillers."""
        latents = torch.cat([self._encode_input(image, mask)[LATENTS] for image in images])
        behind = self.most_inputs - len(latents)
        rows = {LATENTS: pad(latents, (0, 0, 0, 0, 0, 0, 0, behind)).unsqueeze(0)}
        return rows | (
            {FILLERS: torch.full((1, 1), float(behind), device=latents.device)} if self.most_inputs > 1 else {}
        )

    def _encode_input(self, pixels: Float[Tensor, "1 3 H2 W2"], mask: Float[Tensor, "1 1 H2 W2"]) -> Conditioning:
        return {LATENTS: self._latents_of(pixels)}

    def _predict(self, latents: Tensor, timesteps: Tensor, rows: Conditioning) -> Tensor:
        """Run the network without fillers: once for each number of images, because it has no mask for image tokens."""
        if FILLERS not in rows:
            return super()._predict(latents, timesteps, rows)
        fillers = [round(each) for each in rows[FILLERS].flatten().tolist()]
        parts, order = [], []
        for count in sorted(set(fillers)):
            chosen = [row for row, each in enumerate(fillers) if each == count]
            index = torch.tensor(chosen, device=latents.device)
            of_part = {name: value[index] for name, value in rows.items() if name != FILLERS}
            of_part[LATENTS] = of_part[LATENTS][:, : self.most_inputs - count]
            parts.append(super()._predict(latents[index], timesteps[index], of_part))
            order += chosen
        return torch.cat(parts)[torch.tensor(order, device=latents.device).argsort()]


class ReadsSeveralInputs(DiffusersConfig):
    """The key of a family that reads several input images."""

    max_input_images: int = Field(default=1, ge=1, le=10)
    """Most input images of a prompt. Rows of conditioning, and so memory, are of this size for all prompts."""

    @property
    def most_inputs(self) -> int:
        return self.max_input_images

"""The size of images: the keys of `[policy]` that give it, what sizes a model can make, and the latents of it."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from ray_ddpo.common.diffusion.policy import PolicyConfig

PIPELINES_UNIT = 8  # pixels: diffusers' pipelines with a UNet take multiples of it, whatever the decoder
LARGEST_SIDE = 16_384


class SizedConfig(PolicyConfig):
    """Policy whose images may have any height and width that its decoder and its network divide."""

    resolution: int | None = Field(default=None, ge=8, le=LARGEST_SIDE, multiple_of=8)
    """Height and width of square images in pixels. By default the model's own size."""
    height: int | None = Field(default=None, ge=8, le=LARGEST_SIDE)
    """Height of images in pixels. By default the model's own."""
    width: int | None = Field(default=None, ge=8, le=LARGEST_SIDE)
    """Width of images in pixels. By default the model's own."""

    @model_validator(mode="after")
    def _size_is_given_once(self) -> "SizedConfig":
        if self.resolution is not None and (self.height, self.width) != (None, None):
            raise ValueError(
                f"resolution is {self.resolution}, height {self.height} and width {self.width}: give a square's resolution, "
                "or height and width"
            )
        return self

    @abstractmethod
    def part_config(self, part: str) -> dict[str, Any]:
        """Return one part's configuration."""

    @property
    def scale_factor(self) -> int:
        """Pixels a side that one latent stands for. From a file, for a learner loads no decoder to ask."""
        config = self.part_config("vae")
        # AutoencoderTiny's have another name. Without either: the default of diffusers, by the decoder's class.
        default = (64,) if config.get("_class_name") != "AutoencoderTiny" else (64,) * 4
        channels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or default
        return 2 ** (len(channels) - 1)

    @property
    def size_unit(self) -> int:
        """Pixels whose multiples height and width must be."""
        return math.lcm(PIPELINES_UNIT, self.scale_factor)

    @property
    def given_sizes(self) -> dict[str, tuple[int | None, int | None]]:
        """Return the keys that the recipe gives, with height and width each."""
        keys = {"resolution": (self.resolution,) * 2, "height": (self.height, None), "width": (None, self.width)}
        return {key: sides for key, sides in keys.items() if sides != (None, None)}

    def check_size(self) -> None:
        """Refuse a size that the model cannot make. ValueError: the key, its value, and the nearest that are possible."""
        if not self.given_sizes:
            return
        unit = self.size_unit
        for key, sides in self.given_sizes.items():
            pixels = next(side for side in sides if side is not None)
            if pixels % unit:
                below = pixels // unit * unit
                nearest = f"{below} or {below + unit}" if below else f"{unit}"
                raise ValueError(
                    f"policy.{key} is {pixels}: this model makes multiples of {unit} pixels, such as {nearest}"
                )

    def latent_sides(self, own: int | Sequence[int] | None) -> tuple[int, int]:
        """Return height and width of an image's latents; `own`: the model's, of a square or (height, width)."""
        self.check_size()
        if own is None and len(self.given_sizes) < 2 and self.resolution is None:
            raise ValueError("the model says no sample_size: give policy.height and policy.width")
        sides = list(own) if isinstance(own, Sequence) else [own or 0] * 2
        for given in self.given_sizes.values():
            for side, pixels in enumerate(given):
                if pixels is not None:
                    sides[side] = pixels // self.scale_factor
        return sides[0], sides[1]

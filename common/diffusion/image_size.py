"""Image size: the keys of `[policy]` that set it, the sizes a model supports, and the latent shape that follows."""

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
        """Return the pixels per side of one latent. Read from a file, because a learner loads no decoder."""
        config = self.part_config("vae")
        # AutoencoderTiny calls the key differently. Without either key, use diffusers' default for the decoder's class.
        default = (64,) if config.get("_class_name") != "AutoencoderTiny" else (64,) * 4
        channels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or default
        return 2 ** (len(channels) - 1)

    @property
    def size_unit(self) -> int:
        """Return the number of pixels that height and width must be multiples of."""
        return math.lcm(PIPELINES_UNIT, self.scale_factor)

    @property
    def given_sizes(self) -> dict[str, tuple[int | None, int | None]]:
        """Return the size keys that the recipe sets, with the height and width that each gives."""
        keys = {"resolution": (self.resolution,) * 2, "height": (self.height, None), "width": (None, self.width)}
        return {key: sides for key, sides in keys.items() if sides != (None, None)}

    def check_size(self) -> None:
        """Check that the model supports the size.

        Raises:
            ValueError: The message names the key, its value, and the nearest supported sizes.
        """
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
        """Return height and width of an image's latents.

        Args:
            own: the model's default size in latents, of a square or as (height, width).
        """
        self.check_size()
        if own is None and len(self.given_sizes) < 2 and self.resolution is None:
            raise ValueError("the model says no sample_size: give policy.height and policy.width")
        sides = list(own) if isinstance(own, Sequence) else [own or 0] * 2
        for given in self.given_sizes.values():
            for side, pixels in enumerate(given):
                if pixels is not None:
                    sides[side] = pixels // self.scale_factor
        return sides[0], sides[1]

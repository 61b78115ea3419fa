"""What families of video share: a number of frames, latents with an axis of frames, and decoding clip by clip."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.policy import Conditioning, Role
from ray_ddpo.common.recipe.tables import SamplingTable


class VideoPolicy(DiffusersPolicy):
    """A loaded pipeline whose latents have an axis of frames."""

    config: "VideoConfig"
    default_negative: ClassVar[str | None] = ""
    count_key: ClassVar[str] = "num_videos_per_prompt"

    def __init__(self, config: "VideoConfig", pipeline: Any, device: str, sampling: SamplingTable, role: Role) -> None:
        super().__init__(config, pipeline, device, sampling, role)
        self.num_frames, self.frame_rate = config.num_frames, config.frame_rate

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        return super()._encode(prompt, with_negative, max_sequence_length=self.config.max_sequence_length, **keys)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C F H W"]) -> UInt8[Tensor, "B F2 H2 W2 3"]:
        # One clip at a time, because its pixels before they are rounded take as much memory as a batch of images.
        clips, not_finite = [], []
        for row in range(len(latents)):
            clips.append(super().decode(latents[row : row + 1]))
            not_finite += [row] if self.not_finite else []
        self.not_finite = tuple(not_finite)
        return torch.cat(clips)


class VideoConfig(DiffusersConfig):
    """Keys and sizes of a family of video."""

    takes_images: ClassVar[bool] = False
    takes_sde: ClassVar[bool] = True
    network_name: ClassVar[str] = "transformer"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    has_frames: ClassVar[bool] = True
    max_sequence_length: int
    own_size: ClassVar[tuple[int, int]]  # height and width of the pipeline's own videos in pixels

    num_frames: int = Field(default=81, ge=1)
    """Frames of a video: one more than a multiple of the frames that a frame of latents has."""
    frame_rate: float = Field(default=16.0, ge=0.1, le=1000)
    """Frames a second of a stored video."""

    @property
    @abstractmethod
    def frames_per_latent(self) -> int:
        """Return how many frames have one latent frame, after the first one."""

    def check_size(self) -> None:
        super().check_size()
        past = (self.num_frames - 1) % self.frames_per_latent
        if past:
            below, above = self.num_frames - past, self.num_frames - past + self.frames_per_latent
            raise ValueError(
                f"policy.num_frames is {self.num_frames}: this model makes one frame more than a multiple of "
                f"{self.frames_per_latent}, such as {below} or {above}"
            )

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        sides = self.latent_sides([side // self.scale_factor for side in self.own_size])
        return network_config["in_channels"], (self.num_frames - 1) // self.frames_per_latent + 1, *sides

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        own = {"height": size[0], "width": size[1], "num_frames": self.num_frames}  # by default the published model's
        return super().pipeline_arguments(sampling, size) | own

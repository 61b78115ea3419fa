"""Wan 2.2 with two experts (Wan Team 2025): one network for high noise and one for low noise, of which one is trained."""

import functools
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.families.wan import Wan, WanPolicy
from ray_ddpo.common.diffusion.families.wan_published import WAN_22_A14B
from ray_ddpo.common.diffusion.guidance import BOTH, guided
from ray_ddpo.common.diffusion.loading.config_keys import configuration_files
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.network_storage import convert_weights
from ray_ddpo.common.diffusion.policy import Conditioning, Role, quiet_libraries
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable, flow_match_table
from ray_ddpo.common.recipe.tables import SamplingTable

PARTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
Expert = Literal["high_noise", "low_noise"]


def of_experts(table: FlowMatchTable, boundary_ratio: float, expert: Expert) -> FlowMatchTable:
    """Return the steps with noise in those of one expert only, because the other expert's steps are not trained on."""
    mine = is_high(table.timesteps, boundary_ratio, table) == (expert == "high_noise")
    return replace(table, noise_level=table.noise_level * mine)


def is_high(timesteps: Float[Tensor, "B"], boundary_ratio: float, table: FlowMatchTable) -> Bool[Tensor, "B"]:
    """Return whether the expert of high noise predicts at each timestep."""
    return timesteps >= boundary_ratio * table.num_train_timesteps


class Wan22Policy(WanPolicy):
    """A loaded WanPipeline with two experts. The one that is not trained is in samplers alone."""

    config: "Wan22"

    def __init__(self, config: "Wan22", pipeline: Any, device: str, sampling: SamplingTable, role: Role) -> None:
        self._boundary: float = pipeline.config.boundary_ratio
        super().__init__(config, pipeline, device, sampling, role)
        (frozen,) = (getattr(pipeline, part) for part in config.frozen_parts)
        self._frozen = None
        if frozen is not None:
            convert_weights(frozen, self.dtype)
            frozen.to(device=device).eval().requires_grad_(False)
            self._frozen = functools.partial(config.network_call(sampling), frozen)

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        return of_experts(super()._table(sampling), self._boundary, self.config.expert)

    def _guided(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, both: bool
    ) -> Float[Tensor, "B C F H W"]:
        """Run the expert of each row's timestep, as a base class runs its network."""
        assert isinstance(self.steps, FlowMatchTable), "as `_table` returns it"
        high = is_high(timesteps, self._boundary, self.steps)
        if bool((high == high[0]).all()):
            return self._by(bool(high[0]), latents, timesteps, conditioning, both)
        assert not any(name.startswith(BOTH) for name in conditioning), "a task's rows are at one step"
        output = torch.empty_like(latents, dtype=torch.float32)
        for rows in (high, ~high):
            selected = {
                name: value.expand(len(latents), *value.shape[1:])[rows] for name, value in conditioning.items()
            }
            output[rows] = self._by(bool(high[rows][0]), latents[rows], timesteps[rows], selected, both).float()
        return output

    def _by(self, high: bool, latents: Tensor, timesteps: Tensor, rows: Conditioning, both: bool) -> Tensor:
        """Predict with one expert, each with its own guidance scale."""
        low_scale = self.config.guidance_scale_2
        scale = self.guidance_scale if high or low_scale is None else low_scale
        predict = self._predict if high == (self.config.expert == "high_noise") else self._predict_frozen
        return guided(predict, latents, timesteps, rows, scale if both else None, self._combined)

    @torch.no_grad()
    def _predict_frozen(self, latents: Tensor, timesteps: Tensor, rows: Conditioning) -> Tensor:
        if self._frozen is None:
            raise ValueError(
                f"policy.expert is {self.config.expert!r}, and the learner asks for a step of the other expert, which it "
                "does not hold: wan22 trains on the steps of one expert, and takes no algorithm on noised final latents"
            )
        return self._frozen(latents=latents.to(self.dtype), timesteps=timesteps, **self._in_dtype(rows))


class Wan22(Wan):
    """Wan 2.2 A14B, text to video, with one expert trained."""

    policy_class: ClassVar[type[DiffusersPolicy]] = Wan22Policy
    published: ClassVar[dict[str, Configs]] = {"Wan-AI/Wan2.2-T2V-A14B-Diffusers": WAN_22_A14B}

    expert: Expert = "high_noise"
    """The expert that is trained, on the steps that are its own. The other one only samples."""
    guidance_scale_2: float | None = Field(default=None, ge=0)
    """Guidance scale of the expert for low noise. By default `sampling.guidance_scale`."""

    @property
    def trained_part(self) -> str:
        return PARTS[self.expert]

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return tuple(part for part in PARTS.values() if part != self.trained_part)

    def check_sampling(self, sampling: SamplingTable) -> None:
        super().check_sampling(sampling)
        if sampling.trains_no_steps:
            raise ValueError(
                "sampling has no steps that are trained on, and wan22 trains an expert on its own steps: leave out "
                "sampling.deterministic, or give sampling.sde_window beside a solver or a cache"
            )

    def stochastic_steps(self, sampling: SamplingTable) -> int:
        quiet_libraries()
        files = configuration_files(self) or self.published[self.model]
        table = flow_match_table(dict(files["scheduler"]), sampling.num_steps, sampling.eta, None, False, sampling.sde)
        levels = of_experts(table, files["model_index"]["boundary_ratio"], self.expert).noise_level
        return int((levels > 0).sum())

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        scales = {} if self.guidance_scale_2 is None else {"guidance_scale_2": self.guidance_scale_2}
        return super().pipeline_arguments(sampling, size) | scales

"""Wan 2.2 with two experts (Wan Team 2025): a network for high noise and one for low noise. One or both are trained."""

import functools
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.wan import Wan, WanPolicy
from ray_ddpo.common.diffusion.families.wan_published import WAN_22_A14B
from ray_ddpo.common.diffusion.guidance import BOTH, guided
from ray_ddpo.common.diffusion.loading.config_keys import configuration_files
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.network_storage import convert_weights
from ray_ddpo.common.diffusion.policy import Conditioning, Role, quiet_libraries
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable, flow_match_table
from ray_ddpo.common.model_files.weight_files import SECOND_PART
from ray_ddpo.common.recipe.tables import SamplingTable

PARTS = {"high_noise": "transformer", "low_noise": SECOND_PART}
Expert = Literal["high_noise", "low_noise", "both"]


def call_expert(
    call: NetworkCall, network: Any, latents: Tensor, timesteps: Tensor, low_noise: Tensor | None = None, **rows: Tensor
) -> Tensor:
    """Call the second of two networks if there is a mark for low noise, else the first."""
    return call(network if low_noise is None else network.transformer_2, latents, timesteps, **rows)


def of_experts(table: FlowMatchTable, boundary_ratio: float, expert: Expert) -> FlowMatchTable:
    """Return the steps with noise in those of the trained experts only, because the others are not trained on."""
    if expert == "both":
        return table
    mine = is_high(table.timesteps, boundary_ratio, table) == (expert == "high_noise")
    return replace(table, noise_level=table.noise_level * mine)


def is_high(timesteps: Float[Tensor, "B"], boundary_ratio: float, table: FlowMatchTable) -> Bool[Tensor, "B"]:
    """Return whether the expert of high noise predicts at each timestep."""
    return timesteps >= boundary_ratio * table.num_train_timesteps


class ExpertsPolicy(WanPolicy):
    """A loaded pipeline of Wan with two experts. One that is not trained is in samplers alone."""

    config: "Experts"

    def __init__(self, config: "Experts", pipeline: Any, device: str, sampling: SamplingTable, role: Role) -> None:
        self._boundary: float = pipeline.config.boundary_ratio
        super().__init__(config, pipeline, device, sampling, role)
        self._frozen = None
        for frozen in filter(None, (getattr(pipeline, part) for part in config.frozen_parts)):
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
        if self.config.expert == "both":
            predict = self._predict if high else self._predict_low_noise
        else:
            predict = self._predict if high == (self.config.expert == "high_noise") else self._predict_frozen
        return guided(predict, latents, timesteps, rows, scale if both else None, self._combined)

    def _predict_low_noise(self, latents: Tensor, timesteps: Tensor, rows: Conditioning) -> Tensor:
        # The mark is an input, so that compiled and recorded passes of the two networks are told apart.
        return self._predict(latents, timesteps, rows | {"low_noise": torch.zeros_like(timesteps)})

    @torch.no_grad()
    def _predict_frozen(self, latents: Tensor, timesteps: Tensor, rows: Conditioning) -> Tensor:
        if self._frozen is None:
            raise ValueError(
                f"policy.expert is {self.config.expert!r}, and the learner asks for a step of the other expert, which it "
                "does not hold: one expert is trained on its own steps, without algorithms on noised final latents; "
                'give "both" for these'
            )
        return self._frozen(latents=latents.to(self.dtype), timesteps=timesteps, **self._in_dtype(rows))


class Experts(Wan):
    """Keys of Wan 2.2 with two experts."""

    expert: Expert = "high_noise"
    """Experts that are trained: one on the steps that it predicts, while the other only samples, or both on all steps."""
    guidance_scale_2: float | None = Field(default=None, ge=0)
    """Guidance scale of the expert for low noise. By default `sampling.guidance_scale`."""

    @model_validator(mode="after")
    def _both_have_adapters(self) -> "Experts":
        if self.expert == "both" and self.train == "full":
            raise ValueError(
                'expert is "both" and train "full": both networks are trained by adapters only; give train = "lora", or '
                'expert = "high_noise" or "low_noise"'
            )
        return self

    @property
    def trained_part(self) -> str:
        return PARTS["low_noise" if self.expert == "low_noise" else "high_noise"]

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return tuple(part for part in PARTS.values() if part not in (self.trained_part, *self.joined_parts))

    @property
    def joined_parts(self) -> tuple[str, ...]:
        return (SECOND_PART,) if self.expert == "both" else ()

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        call = super().network_call(sampling)
        return functools.partial(call_expert, call) if self.expert == "both" else call

    def check_sampling(self, sampling: SamplingTable) -> None:
        super().check_sampling(sampling)
        if sampling.trains_no_steps and self.expert != "both":
            raise ValueError(
                f"sampling has no steps that are trained on, and policy.expert is {self.expert!r}, which is trained on "
                'its own steps: give "both", leave out sampling.deterministic, or give sampling.sde_window beside a '
                "solver or a cache"
            )
        if not sampling.trains_no_steps:
            self._refuse_experts_without_steps(sampling)
        if self.guidance_scale_2 is not None and not sampling.is_guided:
            raise ValueError(
                f"policy.guidance_scale_2 is {self.guidance_scale_2:g} and sampling.guidance_scale "
                f"{sampling.guidance_scale:g}, with which no expert is guided, as in diffusers: leave guidance_scale_2 "
                "out, or give a guidance_scale above 1"
            )

    def _refuse_experts_without_steps(self, sampling: SamplingTable) -> None:
        """Raise ValueError if an expert is to be trained and no step that can be trained on is its own."""
        table, boundary = self._schedule(sampling)
        high = is_high(table.timesteps, boundary, table)
        steps = torch.nonzero(of_experts(table, boundary, self.expert).noise_level).flatten().tolist()
        end = (sampling.num_steps if sampling.sde_window else len(steps)) - sampling.skip_last_steps
        reached = range(sampling.skip_first_steps, end)
        trained = sorted(set(steps) & set(reached)) if sampling.sde_window else steps[reached.start : end]
        for expert, own in (("high_noise", high), ("low_noise", ~high)):
            if self.expert in (expert, "both") and not own[trained].any():
                raise ValueError(
                    f'policy.expert is "{self.expert}", and the steps that can be trained on are {trained}: none is of the '
                    f"expert {expert}, which predicts at {torch.nonzero(own).flatten().tolist()} of 0 to "
                    f"{sampling.num_steps - 1}, the last of them without noise; give other sampling.num_steps or "
                    "skipped steps, or another expert"
                )

    def stochastic_steps(self, sampling: SamplingTable) -> int:
        table, boundary = self._schedule(sampling)
        return int((of_experts(table, boundary, self.expert).noise_level > 0).sum())

    def _schedule(self, sampling: SamplingTable) -> tuple[FlowMatchTable, float]:
        """Return the steps, and the share of the timesteps at which the experts change.

        They are the published ones if the model's files do not tell; loading reports what these lack.
        """
        quiet_libraries()
        files = configuration_files(self)
        if "scheduler" not in files or not isinstance(files.get("model_index", {}).get("boundary_ratio"), float):
            files = self.published.get(self.model) or next(iter(self.published.values()))
        table = flow_match_table(dict(files["scheduler"]), sampling.num_steps, sampling.eta, None, False, sampling.sde)
        return table, files["model_index"]["boundary_ratio"]

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        scales = {} if self.guidance_scale_2 is None else {"guidance_scale_2": self.guidance_scale_2}
        return super().pipeline_arguments(sampling, size) | scales


class Wan22(Experts):
    """Wan 2.2 A14B, text to video, with one expert or both trained."""

    policy_class: ClassVar[type[DiffusersPolicy]] = ExpertsPolicy
    published: ClassVar[dict[str, Configs]] = {"Wan-AI/Wan2.2-T2V-A14B-Diffusers": WAN_22_A14B}

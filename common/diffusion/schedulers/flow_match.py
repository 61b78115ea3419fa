"""Flow matching (Lipman et al. 2023) with noise: mean and standard deviation of one step, by each of three samplers."""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.schedulers.conversion import FILE, FLOW, FLOW_SOLVERS, flow_config, written_keys
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps, NoisedLatents
from ray_ddpo.common.diffusion.schedulers.second_order import FLOW_PREDICTION, SolverLevels
from ray_ddpo.common.diffusion.transition import Transition, column
from ray_ddpo.common.recipe.sampling_table import FlowSampler


@dataclass(frozen=True)
class FlowMatchTable(DenoisingSteps):
    """Flow-SDE: x_σ = (1 − σ) x0 + σ ε, from σ = 1 to 0. The network predicts v = ε − x0."""

    timesteps: Float[Tensor, "T"]  # 1000 σ, rounded as the scheduler does
    sigmas: Float[Tensor, "T"]  # where the step starts
    next_sigmas: Float[Tensor, "T"]  # where it ends
    noise_level: Float[Tensor, "T"]  # a; 0: the step is deterministic
    training_sigmas: Float[Tensor, "N"]  # σ of each of the model's own timesteps, spaced as in its training

    def to(self, device: str) -> "FlowMatchTable":
        """Return the table on another device."""
        return type(self)(**{each.name: getattr(self, each.name).to(device) for each in fields(self)})

    @property
    def num_train_timesteps(self) -> int:
        return len(self.training_sigmas)

    def diffusion(self) -> Float[Tensor, "T"]:
        """Return s = √(σ / (1 − σ′)) · a (Flow-GRPO, section 4.2).

        σ′ is σ or, where that is as near to 1 as the model's own last timestep but one, the schedule's second σ.
        """
        return self._diffusion

    @cached_property
    def _diffusion(self) -> Float[Tensor, "T"]:
        # Some schedules begin one timestep below σ = 1, where the square root is nearly infinite, too. A shifted σ has a
        # rounding error, in either direction.
        nearly_one = self.sigmas > self.training_sigmas[-2] - 1e-5
        finite = torch.where(nearly_one, self.next_sigmas[0], self.sigmas)
        return (self.sigmas / (1 - finite)).sqrt() * self.noise_level

    def std(self) -> Float[Tensor, "T"]:
        """Return s √(−dt); 0 where the step is deterministic."""
        return self._std

    @cached_property
    def _std(self) -> Float[Tensor, "T"]:
        return self.diffusion() * (self.sigmas - self.next_sigmas).sqrt()

    def transition(
        self,
        latents: Float[Tensor, "B C *S"],
        model_output: Float[Tensor, "B C *S"],
        steps: Int[Tensor, "B"],
        stochastic: bool = True,
    ) -> Transition:
        """Return the step's distribution, with Flow-GRPO's mean (eq. 9).

        μ = x (1 + s²/(2σ) dt) + v (1 + s² (1 − σ)/(2σ)) dt. If `stochastic` is False, take the Euler step x + v dt, for
        which s = 0.
        """
        latents, velocity = latents.float(), model_output.float()
        sigma, change = (column(each[steps], latents) for each in (self.sigmas, self.next_sigmas - self.sigmas))
        std = self.std()[steps] if stochastic else torch.zeros_like(sigma).flatten()
        half = (
            column(self.diffusion()[steps], latents).square() / (2 * sigma) if stochastic else torch.zeros_like(sigma)
        )
        mean = latents * (1 + half * change) + velocity * (1 + half * (1 - sigma)) * change
        return Transition(mean, std)

    def solver_levels(self) -> SolverLevels:
        return SolverLevels(torch.cat([self.sigmas, self.next_sigmas[-1:]]).clamp(max=1.0), FLOW_PREDICTION)

    def clean(
        self, latents: Float[Tensor, "B C *S"], model_output: Float[Tensor, "B C *S"], steps: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C *S"]:
        """Return x0 = x_σ − σ v."""
        return latents.float() - column(self.sigmas[steps], latents) * model_output.float()

    def noised(
        self, clean_latents: Float[Tensor, "B C *S"], noise: Float[Tensor, "B C *S"], step: int
    ) -> Float[Tensor, "B C *S"]:
        sigma = self.sigmas[step]
        return (1 - sigma) * clean_latents + sigma * noise

    def add_noise(
        self, clean_latents: Float[Tensor, "B C *S"], noise: Float[Tensor, "B C *S"], timesteps: Int[Tensor, "B"]
    ) -> NoisedLatents:
        sigmas = self.training_sigmas[timesteps]
        level = column(sigmas, clean_latents)
        noised = (1 - level) * clean_latents + level * noise
        return noised, self.num_train_timesteps * sigmas, noise - clean_latents

    def clean_scale(self, timesteps: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return σ, because x0 = x_σ − σ v."""
        return self.training_sigmas[timesteps]


@dataclass(frozen=True)
class DanceTable(FlowMatchTable):
    """Dance-SDE (DanceGRPO, arXiv 2505.07818, equation 8): Flow-SDE's step with one diffusion s = η at all noise levels."""

    @cached_property
    def _diffusion(self) -> Float[Tensor, "T"]:
        return self.noise_level


@dataclass(frozen=True)
class CPSTable(FlowMatchTable):
    """Coefficients-preserving sampling (arXiv 2509.05952): the next latents have exactly the schedule's signal and noise.

    A part of the predicted noise is replaced by new noise, in proportions cos and sin of η π/2.
    """

    @cached_property
    def _angle(self) -> Float[Tensor, "T"]:
        return self.noise_level.double() * (math.pi / 2)

    @cached_property
    def _std(self) -> Float[Tensor, "T"]:
        return self.next_sigmas * self._angle.sin().float()

    @cached_property
    def _kept_noise(self) -> Float[Tensor, "T"]:
        # Not √(σ'² − std²), which is of a negative number if rounding makes std the larger one.
        return self.next_sigmas * self._angle.cos().float()

    def diffusion(self) -> Float[Tensor, "T"]:
        """Return s for which s √(−dt) is the step's standard deviation."""
        return self._std / (self.sigmas - self.next_sigmas).sqrt()

    def transition(
        self,
        latents: Float[Tensor, "B C *S"],
        model_output: Float[Tensor, "B C *S"],
        steps: Int[Tensor, "B"],
        stochastic: bool = True,
    ) -> Transition:
        """Return the step's distribution: μ = (1 − σ') x̂0 + σ' cos(η π/2) ε̂, with standard deviation σ' sin(η π/2).

        Here x̂0 = x − σ v and ε̂ = x + (1 − σ) v. With η = 0 this is the Euler step.
        """
        if not stochastic:
            return super().transition(latents, model_output, steps, stochastic)
        latents, velocity = latents.float(), model_output.float()
        sigma, signal = (column(each[steps], latents) for each in (self.sigmas, 1 - self.next_sigmas))
        clean, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
        return Transition(signal * clean + column(self._kept_noise[steps], latents) * noise, self.std()[steps])


TABLES: dict[FlowSampler, type[FlowMatchTable]] = {"flow": FlowMatchTable, "dance": DanceTable, "cps": CPSTable}


def flow_match_table(
    scheduler_config: dict[str, Any],
    num_steps: int,
    noise_level: float,
    image_tokens: int | None,
    evenly_spaced: bool,
    sde: FlowSampler | None = None,
    shift: float | None = None,
) -> FlowMatchTable:
    """Return the table for a diffusers scheduler configuration, on the CPU.

    The last step is deterministic, because its ratios would explode.

    Args:
        scheduler_config: the diffusers configuration.
        num_steps: the number of steps.
        noise_level: a or η of the stochastic sampler.
        image_tokens: decides how far noise levels are shifted, if the configuration asks for dynamic shifting. None: the
            pipeline does not shift them so, and may have a solver as its scheduler.
        evenly_spaced: whether σ goes in equal steps from 1 to 1/T before the shift, as in FLUX, instead of down to the
            schedule's own minimum.
        sde: the stochastic sampler, as the recipe has it. None: Flow-SDE.
        shift: μ of dynamic shifting. None: as the configuration interpolates it between numbers of image tokens.

    Raises:
        ValueError: The configuration's steps are no flow from noise to the image, or have noise of their own.
    """
    scheduler, training_sigmas = _scheduler_with_steps(scheduler_config, num_steps, image_tokens, evenly_spaced, shift)
    sigmas = scheduler.sigmas
    if not sigmas.isfinite().all() or not (sigmas.diff() < 0).all() or sigmas[0] > 1 + 1e-5:
        raise ValueError(
            f"sampling.num_steps is {num_steps}, and the model's scheduler has noise levels {sigmas.tolist()[:4]} …: "
            f"they must fall from 1 or less to 0, step by step (shift, shift_terminal and the like in {FILE})"
        )
    levels = torch.full((num_steps,), noise_level)
    levels[-1] = 0.0
    return TABLES[sde or "flow"](scheduler.timesteps.float(), sigmas[:-1], sigmas[1:], levels, training_sigmas)


def _scheduler_with_steps(
    scheduler_config: dict[str, Any],
    num_steps: int,
    image_tokens: int | None,
    evenly_spaced: bool,
    shift: float | None,
) -> tuple[Any, Tensor]:
    """Return diffusers' scheduler with its steps set, and σ of each of the model's own timesteps.

    Raises:
        ValueError: No schedule follows from the configuration.
    """
    import diffusers
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    written = flow_config(scheduler_config, with_solver=image_tokens is None)
    name = scheduler_config.get("_class_name")
    of_solver = name in FLOW_SOLVERS
    try:
        scheduler: Any = getattr(diffusers, name if of_solver else FLOW).from_config(written)
        own = {
            "num_train_timesteps": scheduler.config["num_train_timesteps"],
            "shift": scheduler.config.get("flow_shift"),
        }
        trained: Any = diffusers.FlowMatchEulerDiscreteScheduler(**own) if of_solver else scheduler
        training_sigmas = trained.sigmas.flip(0)
        keys: dict[str, Any] = {"num_inference_steps": num_steps}
        if evenly_spaced:
            keys["sigmas"] = torch.linspace(1.0, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
        if scheduler.config["use_dynamic_shifting"] and image_tokens is not None:
            shifts = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            interpolated = calculate_shift(image_tokens, *(scheduler.config[key] for key in shifts))
            keys["mu"] = interpolated if shift is None else shift
        scheduler.set_timesteps(**keys)
    except (TypeError, ValueError, ZeroDivisionError) as error:  # diffusers raises these on keys of no schedule
        given = written_keys(scheduler_config).items()
        shown = ", ".join(f"{key}={value!r}" for key, value in given if "shift" in key or "seq_len" in key)
        raise ValueError(
            f"the model's scheduler has {shown}, of which no schedule follows: {error} (in {FILE})"
        ) from None
    return scheduler, training_sigmas

"""DDIM (Song et al. 2021): mean and standard deviation of one step, from the paper's equations 12 and 16."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.schedulers.conversion import FILE, ddim_config
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps, NoisedLatents
from ray_ddpo.common.diffusion.schedulers.second_order import SMALLEST_ALPHA, SolverLevels
from ray_ddpo.common.diffusion.transition import Transition, column


@dataclass(frozen=True)
class DDIMTable(DenoisingSteps):
    """The quantities of each of the T steps."""

    timesteps: Int[Tensor, "T"]  # the model's own, 999 … 0
    alphas_cumprod: Float[Tensor, "T"]  # ᾱ where the step starts
    next_alphas_cumprod: Float[Tensor, "T"]  # ᾱ where it ends
    eta: Float[Tensor, "T"]  # 0: the step is deterministic
    prediction_type: str  # epsilon, v_prediction or sample
    training_alphas_cumprod: Float[Tensor, "N"]  # ᾱ of each of the model's own timesteps

    @property
    def num_train_timesteps(self) -> int:
        return len(self.training_alphas_cumprod)

    def std(self) -> Float[Tensor, "T"]:
        """Return σ of each step (eq. 16); 0 where the step is deterministic."""
        return self._std

    @cached_property
    def _std(self) -> Float[Tensor, "T"]:
        variance = (1 - self.next_alphas_cumprod) / (1 - self.alphas_cumprod)
        return self.eta * (variance * (1 - self.alphas_cumprod / self.next_alphas_cumprod)).clamp(min=0).sqrt()

    def transition(
        self,
        latents: Float[Tensor, "B C *S"],
        model_output: Float[Tensor, "B C *S"],
        steps: Int[Tensor, "B"],
        stochastic: bool = True,
    ) -> Transition:
        """Return the step's distribution, with μ = √ᾱ' x̂0 + √(1 − ᾱ' − σ²) ε (eq. 12).

        If `stochastic` is False, take the deterministic DDIM step (σ = 0). Its mean differs from the stochastic mean;
        using the latter without noise washes images out.
        """
        latents, model_output = latents.float(), model_output.float()
        alpha, next_alpha = (column(each[steps], latents) for each in (self.alphas_cumprod, self.next_alphas_cumprod))
        clean, noise = _clean_and_noise(self.prediction_type, latents, model_output, alpha)
        std = self.std()[steps] if stochastic else torch.zeros_like(alpha).flatten()
        mean = next_alpha.sqrt() * clean + (1 - next_alpha - column(std, latents).square()).clamp(min=0).sqrt() * noise
        return Transition(mean, std)

    def solver_levels(self) -> SolverLevels:
        alphas = torch.cat([self.alphas_cumprod, self.next_alphas_cumprod[-1:]]).clamp(min=SMALLEST_ALPHA)
        return SolverLevels(((1 - alphas) / alphas).sqrt(), self.prediction_type)

    def clean(
        self, latents: Float[Tensor, "B C *S"], model_output: Float[Tensor, "B C *S"], steps: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C *S"]:
        alpha = column(self.alphas_cumprod[steps], latents)
        return _clean_and_noise(self.prediction_type, latents.float(), model_output.float(), alpha)[0]

    def noised(
        self, clean_latents: Float[Tensor, "B C *S"], noise: Float[Tensor, "B C *S"], step: int
    ) -> Float[Tensor, "B C *S"]:
        alpha = self.alphas_cumprod[step]
        return alpha.sqrt() * clean_latents + (1 - alpha).sqrt() * noise

    def add_noise(
        self, clean_latents: Float[Tensor, "B C *S"], noise: Float[Tensor, "B C *S"], timesteps: Int[Tensor, "B"]
    ) -> NoisedLatents:
        alphas = column(self.training_alphas_cumprod[timesteps], clean_latents)
        signal, spread = alphas.sqrt(), (1 - alphas).sqrt()
        v = signal * noise - spread * clean_latents
        target = {"epsilon": noise, "v_prediction": v, "sample": clean_latents}[self.prediction_type]
        return signal * clean_latents + spread * noise, timesteps, target


def ddim_table(scheduler_config: dict[str, Any], num_steps: int, eta: float, device: str) -> DDIMTable:
    """Return the table of `num_steps` steps for a diffusers scheduler configuration of any class that SD models use.

    Raises:
        ValueError: DDIM cannot represent the configuration, or its schedule has no such steps.
    """
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_config(ddim_config(scheduler_config))
    alphas, ends_at_zero = scheduler.alphas_cumprod, scheduler.config["rescale_betas_zero_snr"]
    falls = (scheduler.betas >= 0).all() and (alphas[:-1] > 0).all() and (ends_at_zero or alphas[-1] > 0)
    if not falls or not alphas.isfinite().all():
        _refuse_betas(scheduler)
    timesteps = _timesteps(scheduler, num_steps)
    following = timesteps - scheduler.config["num_train_timesteps"] // num_steps
    if scheduler.config["prediction_type"] == "epsilon" and not alphas[timesteps].all():
        raise ValueError(
            "the model's scheduler has rescale_betas_zero_snr=True and prediction_type epsilon: its first step "
            "divides by 0"
        )
    final = scheduler.final_alpha_cumprod.to(alphas)
    next_alphas = torch.where(following >= 0, alphas[following.clamp(min=0)], final)
    table = DDIMTable(
        timesteps.to(device),
        alphas[timesteps].to(device),
        next_alphas.to(device),
        torch.full((num_steps,), eta, device=device),
        scheduler.config["prediction_type"],
        alphas.to(device),
    )
    if not table.std().isfinite().all():
        _refuse_betas(scheduler)
    return table


def _refuse_betas(scheduler: Any) -> NoReturn:
    keys = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
    shown = ", ".join(f"{key}={scheduler.config[key]!r:.40}" for key in keys if scheduler.config[key] is not None)
    raise ValueError(f"the model's scheduler has {shown}: every beta must be above 0 and below 1 (in {FILE})")


def _timesteps(scheduler: Any, num_steps: int) -> Int[Tensor, "T"]:
    """Return the timesteps that diffusers steps on. Raise ValueError if some are outside of the model's schedule."""
    count, spacing = scheduler.config["num_train_timesteps"], scheduler.config["timestep_spacing"]
    if num_steps > count:
        raise ValueError(
            f"sampling.num_steps is {num_steps}, and the model's scheduler has num_train_timesteps={count}: it must be "
            f"at most {count}"
        )
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.long()
    outside = [timestep for timestep in timesteps.tolist() if not 0 <= timestep < count]
    if outside:
        raise ValueError(
            f"sampling.num_steps is {num_steps}: with timestep_spacing={spacing!r} and steps_offset="
            f"{scheduler.config['steps_offset']} the model's scheduler would step on timestep {outside[0]}, and the "
            f"model has 0 to {count - 1}: give another number of steps"
        )
    return timesteps


def _clean_and_noise(prediction_type: str, latents: Tensor, output: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return x̂0 and ε from the network's output (Salimans & Ho 2022, appendix D, for v)."""
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "epsilon":
        return (latents - spread * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * latents - spread * output, signal * output + spread * latents
    return output, (latents - signal * output) / spread

"""Deterministic steps: the schedule's own, with a cache of network outputs, or by a solver of second order.

A run of deterministic steps ends at an SDE window or with the image. Its state is made for it and dies with it: the
bits of an image depend neither on what was sampled before nor on the other images of its batch.
"""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Conditioning, Policy
from ray_ddpo.common.diffusion.schedulers.second_order import dpm_solver
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.tables import SamplingTable

Step = Callable[[Tensor, int, Conditioning], Transition]  # (latents, step, conditioning) → a step with std 0


@final
class SampledSteps:
    """The steps of one call of a sampler: the policy's own, or the schedule's for another number of steps."""

    def __init__(self, policy: Policy, sampling: SamplingTable) -> None:
        self._policy = policy
        self._has_own_steps = sampling.num_steps == policy.num_steps
        self._sampling = sampling
        self.num_steps = sampling.num_steps
        if not self._has_own_steps or sampling.is_fast or sampling.deterministic:
            self.table = policy.denoising_steps(sampling)

    @property
    def stochastic_steps(self) -> list[int]:
        """Return the steps whose standard deviation is above 0."""
        if self._has_own_steps:
            return self._policy.stochastic_steps
        return torch.nonzero(self.table.std() > 0).flatten().tolist()

    def transition(self, latents: Tensor, step: int, rows: Conditioning, stochastic: bool = True) -> Transition:
        """Return the distribution of a step that all rows take: of the policy's own steps, as the learner has it."""
        steps = self._steps(latents, step)
        if self._has_own_steps:
            return self._policy.transition(latents, steps, rows, stochastic)
        return self.table.transition(latents, self.predict(latents, step, rows), steps, stochastic)

    def deterministic_run(self, run: range) -> Step:
        """Return the function that takes the deterministic steps of `run`, one after the other."""
        if not len(run):
            return self._plain_step
        if self._sampling.solver == "dpmsolver++":
            return SolverRun(self, run)
        if self._sampling.cache_interval > 1:
            return CachedRun(self, run, self._sampling.cache_interval)
        return self._plain_step

    def predicted_run(self, run: range) -> Step:
        """Return the function that takes the deterministic steps of `run` from `predict`'s outputs."""
        take = self.deterministic_run(run)
        return self._predicted_step if take == self._plain_step else take

    def side_step(self, latents: Tensor, step: int) -> Transition:
        """Return the stochastic step from the same latents and network output as the last deterministic one."""
        return self.table.transition(latents, self._output, self._steps(latents, step))

    def predict(self, latents: Tensor, step: int, rows: Conditioning) -> Float[Tensor, "B C *S"]:
        """Return the network's guided output at a step."""
        self._output = self._policy.predict(latents, self.table.timesteps[self._steps(latents, step)], rows)
        return self._output

    def deterministic_transition(self, latents: Tensor, output: Tensor, step: int) -> Transition:
        """Return the schedule's own deterministic step for a network output."""
        return self.table.transition(latents, output, self._steps(latents, step), stochastic=False)

    def _predicted_step(self, latents: Tensor, step: int, rows: Conditioning) -> Transition:
        return self.deterministic_transition(latents, self.predict(latents, step, rows), step)

    def _plain_step(self, latents: Tensor, step: int, rows: Conditioning) -> Transition:
        return self.transition(latents, step, rows, stochastic=False)

    def _steps(self, latents: Tensor, step: int) -> Tensor:
        return torch.full((len(latents),), step, device=self._policy.device)


@final
class CachedRun:
    """Deterministic steps that run the network now and then, and extrapolate its guided output between.

    This is TaylorSeer's idea (Liu et al. 2025, arXiv 2503.06923) at first order, applied to the output of the network
    instead of its layers' features, so that it fits every network.
    """

    def __init__(self, steps: SampledSteps, run: range, interval: int) -> None:
        self._steps = steps
        self._network_steps = network_steps(run, interval)
        self._timesteps = steps.table.timesteps.double().tolist()
        self._known: list[tuple[float, Tensor]] = []  # timestep and output of the last two runs of the network

    def __call__(self, latents: Tensor, step: int, rows: Conditioning) -> Transition:
        if step in self._network_steps:
            output = self._steps.predict(latents, step, rows).float()
            self._known = [*self._known[-1:], (self._timesteps[step], output)]
        else:
            output = extrapolated(self._known, self._timesteps[step])
        return self._steps.deterministic_transition(latents, output, step)


@final
class SolverRun:
    """Deterministic steps by DPM-Solver++(2M), which also uses the clean latents that the step before predicted."""

    def __init__(self, steps: SampledSteps, run: range) -> None:
        self._steps = steps
        self._scheduler = dpm_solver(steps.table.solver_levels(), run.start)

    def __call__(self, latents: Tensor, step: int, rows: Conditioning) -> Transition:
        output = self._steps.predict(latents, step, rows).float()
        (mean,) = self._scheduler.step(output, step, latents.float(), return_dict=False)
        return Transition(mean, torch.zeros(len(latents), device=latents.device))


def network_steps(run: range, interval: int) -> frozenset[int]:
    """Return the steps of a run at which the network runs: the first two, then every `interval`-th."""
    return frozenset(step for place, step in enumerate(run) if place == 0 or (place - 1) % interval == 0)


def extrapolated(known: list[tuple[float, Tensor]], timestep: float) -> Float[Tensor, "B C *S"]:
    """Return an output at `timestep`, on the line through the last two known ones; with one, that one."""
    last, output = known[-1]
    if len(known) == 1:
        return output
    before, earlier = known[-2]
    return output + (timestep - last) / (last - before) * (output - earlier)

"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) on a schedule's own noise levels, by diffusers' scheduler."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

FLOW_PREDICTION = "flow_prediction"  # diffusers' name of a velocity v = ε − x0
SMALLEST_ALPHA = 2.0**-24  # ᾱ in place of 0, where diffusers' schedulers have it too


@dataclass(frozen=True)
class SolverLevels:
    """The noise levels between a schedule's T steps, as diffusers' solvers take them."""

    sigmas: Float[Tensor, "T1"]  # √((1 − ᾱ)/ᾱ), or a flow's σ; one more than steps
    prediction_type: str  # epsilon, v_prediction, sample or FLOW_PREDICTION


def dpm_solver(levels: SolverLevels, first_step: int) -> Any:
    """Return a scheduler of diffusers that takes these steps, from `first_step` on, without noise.

    Its first step is of first order, as there is no output before it. With fewer than 15 steps, or if the schedule ends
    at σ = 0, the last one is, too. These are diffusers' own rules.
    """
    from diffusers import DPMSolverMultistepScheduler

    keys: dict[str, Any] = {
        "prediction_type": levels.prediction_type,
        "use_flow_sigmas": levels.prediction_type == FLOW_PREDICTION,
        "final_sigmas_type": "zero" if float(levels.sigmas[-1]) == 0 else "sigma_min",
    }
    scheduler: Any = DPMSolverMultistepScheduler(**keys)
    scheduler.set_timesteps(len(levels.sigmas) - 1)
    scheduler.sigmas = levels.sigmas.float().cpu()  # the schedule's own, in place of diffusers' default spacing
    scheduler.set_begin_index(first_step)
    return scheduler

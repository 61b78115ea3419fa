"""Convert a published scheduler's configuration to DDIM or flow matching, exactly, or refuse it by key.

A scheduler of another class can be converted if it denoises the same process: same betas, same prediction type. DDIM
then replaces its solver, as in `DDIMScheduler.from_config`. Other noise levels have no counterpart in DDIM.
"""

import math
from collections.abc import Mapping
from typing import Any

from ray_ddpo.common.packages import require_packages

FILE = "scheduler/scheduler_config.json"
DDIM = "DDIMScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_SOLVERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # with use_flow_sigmas of a flow
BETA_RANGES = ("linear", "scaled_linear")  # beta schedules from beta_start to beta_end
CLIPPING = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")  # by default
CARRIED = (
    *CLIPPING,
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
)
# Packages that diffusers needs for a scheduler.
NEEDED = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}
# Defaults of some schedulers that differ from DDIM's: (theirs, DDIM's).
OWN_BETAS = {"beta_start": (0.00085, 0.0001), "beta_end": (0.012, 0.02)}
WITH_OWN_BETAS = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
# StableDiffusionPipeline considers other values of these keys outdated, and corrects them.
CORRECTED = {"clip_sample": False, "steps_offset": 1}

# Key → values that DDIM supports, why no others, and the remedy if changing the value keeps the process the same.
SPACED = "it spaces noise levels otherwise than DDIM, which steps on the model's own timesteps"
TRAINED = "a network that was trained on such noise levels cannot be stepped by DDIM"
OFF, FIXED = (False, None), (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "prediction_type": (("epsilon", "v_prediction", "sample"), "it must be epsilon, v_prediction or sample"),
    "beta_schedule": ((*BETA_RANGES, "squaredcos_cap_v2"), "it must be linear, scaled_linear or squaredcos_cap_v2"),
    "timestep_spacing": (("leading", "trailing", "linspace"), "it must be leading, trailing or linspace"),
    **dict.fromkeys(SPACINGS, (OFF, f"{SPACED}; set it to false")),
    "interpolation_type": (("linear",), f'{SPACED}; set it to "linear"'),
    "lambda_min_clipped": ((-math.inf, None), f"{SPACED}; leave it out"),
    "timestep_type": (("discrete",), TRAINED),
    **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting"), (OFF, TRAINED)),
    **dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal"), ((None,), TRAINED)),
    "snr_shift_scale": ((None, 1), TRAINED),
    "variance_type": (FIXED, "the network predicts variances, which no step here uses"),
    **dict.fromkeys(("clip_sample", "thresholding"), (OFF, "its steps are not Gaussian; set it to false")),
}

FLOW_ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {  # the same for FLOW_SOLVERS
    "prediction_type": (("flow_prediction",), 'it must be "flow_prediction"'),
    **dict.fromkeys(SPACINGS, (OFF, "its noise levels are not those of use_flow_sigmas; set it to false")),
    **{key: ALLOWED[key] for key in ("variance_type", "thresholding")},
    "predict_x0": ((True,), "diffusers takes no such steps of a flow; set it to true"),
}


def ddim_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration from which `DDIMScheduler.from_config` makes the same process.

    Args:
        config: a loaded scheduler's configuration, or the contents of its file. Without `_class_name` it is DDIM's own,
            and does not clip.

    Raises:
        ValueError: DDIM cannot represent it exactly. The message names class, key and value, and what is allowed.
    """
    written, name = written_keys(config), config.get("_class_name")
    if name is not None:
        _check_class(name, CARRIED, "policy.name is a family that steps by DDIM")
    _check_allowed(name, written, ALLOWED)
    _check_absent(name, written)
    _check_numbers(name, written)
    if written.get("final_sigmas_type", "zero") != "zero" and written.get("set_alpha_to_one", True):
        raise ValueError(
            f"{_says(name, 'final_sigmas_type', written['final_sigmas_type'])}: DDIM ends so only where "
            f'set_alpha_to_one is false; set it to "zero", or set_alpha_to_one to false, in {FILE}'
        )
    # Only the CLIPPING classes clip by default, and those must have the key, so an absent key means False.
    return {"clip_sample": False, **written}


def last_step_is_stochastic(config: Mapping[str, Any]) -> bool:
    """Return whether the last step of DDIM has noise, by the keys of a scheduler's file: it must not end at the image."""
    spacing, offset = config.get("timestep_spacing", "leading"), config.get("steps_offset", 0)
    ends_where_it_starts = spacing == "linspace" or (spacing == "leading" and not offset)
    return not config.get("set_alpha_to_one", True) and not ends_where_it_starts


def flow_config(config: Mapping[str, Any], with_solver: bool = False) -> dict[str, Any]:
    """Return the configuration from which the flow's own scheduler class makes the same flow.

    That class is `FlowMatchEulerDiscreteScheduler` or, `with_solver`, one whose steps of first order are Euler steps.

    Raises:
        ValueError: The scheduler is another class, or its steps differ. The message names class, key and value.
    """
    written, name = written_keys(config), config.get("_class_name")
    if with_solver and name in FLOW_SOLVERS and written.get("use_flow_sigmas"):
        _check_allowed(name, {"prediction_type": "epsilon", **written}, FLOW_ALLOWED)
        return written
    if name is not None:
        own = {key: written[key] for key in ("flow_shift", "prediction_type", "use_flow_sigmas") if key in written}
        with_keys = f" with {', '.join(f'{key}={value!r}' for key, value in own.items())}" if own else ""
        carried = (
            (FLOW, *(f"{solver} with use_flow_sigmas=True" for solver in FLOW_SOLVERS)) if with_solver else (FLOW,)
        )
        _check_class(name, carried, "policy.name is a family of flow matching", with_keys)
    for key in ("invert_sigmas", "stochastic_sampling"):
        if written.get(key):
            raise ValueError(f"{_says(name, key, written[key])}: set it to false in {FILE}")
    if written.get("use_beta_sigmas"):
        require_packages(f"{_says(name, 'use_beta_sigmas', True)}, for which diffusers", "scipy")
    if written.get("time_shift_type", "exponential") not in ("exponential", "linear"):
        says = _says(name, "time_shift_type", written["time_shift_type"])
        raise ValueError(f'{says}: it must be "exponential" or "linear" (in {FILE})')
    return written


def check_scheduler(index: Mapping[str, Any], config: Mapping[str, Any], flow: bool, with_solver: bool = False) -> None:
    """Raise ValueError if a schedule cannot be represented exactly, in any class that diffusers makes from a folder."""
    for read in as_loaded(index, config):
        flow_config(read, with_solver) if flow else ddim_config(read)


def as_loaded(index: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a folder's scheduler configuration for each class that it may be loaded as: the index's and the file's."""
    named = (index.get("scheduler") or [None, None])[1]
    classes = dict.fromkeys(name for name in (named, config.get("_class_name")) if name)
    read = [{**config, "_class_name": name} for name in classes] or [dict(config)]
    pipeline = index.get("_class_name")
    if pipeline in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
        corrected = CORRECTED if pipeline == "StableDiffusionPipeline" else {"steps_offset": CORRECTED["steps_offset"]}
        for keys in read:
            is_ddim = keys.get("_class_name") == DDIM
            keys |= {key: value for key, value in corrected.items() if key in keys or is_ddim}
    return read


def written_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that a scheduler's file has, with those that the pipeline corrects in a loaded DDIMScheduler."""
    unwritten = set(config.get("_use_default_values", ()))
    if config.get("_class_name") == DDIM:
        unwritten -= {key for key, value in CORRECTED.items() if config.get(key) == value}
    return {key: value for key, value in config.items() if key not in unwritten and key != "_use_default_values"}


def is_number(value: Any) -> bool:
    """Return whether a key's value is a finite number. Booleans are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_class(name: str, carried: tuple[str, ...], why: str, with_keys: str = "") -> None:
    """Raise ValueError if the scheduler's class cannot be converted, or needs a package that is not installed."""
    if name not in carried:
        raise ValueError(
            f"the model's scheduler is {name}{with_keys}: {why}, and takes over the schedules of {', '.join(carried)}; "
            f"no other gives it the noise levels that the model was trained with (model_index.json, {FILE})"
        )
    if name in NEEDED:
        require_packages(f"the model's scheduler is {name}, for which diffusers", NEEDED[name])


def _check_allowed(
    name: str | None, written: Mapping[str, Any], allowed: Mapping[str, tuple[tuple[Any, ...], str]]
) -> None:
    """Raise ValueError if a key has another value than the allowed ones."""
    for key, (values, reason) in allowed.items():
        if key in written and written[key] not in values:
            raise ValueError(f"{_says(name, key, written[key])}: {reason} (in {FILE})")


def _check_absent(name: str | None, written: Mapping[str, Any]) -> None:
    """Raise ValueError if an absent key means something else than in DDIM."""
    for key, (own, ddims) in OWN_BETAS.items():
        if name in WITH_OWN_BETAS and key not in written:
            raise ValueError(
                f"the model's scheduler is {name} without {key}, which is then {own} there and {ddims} in DDIM: "
                f'write "{key}" into {FILE}'
            )
    if name in CLIPPING and "clip_sample" not in written:
        raise ValueError(
            f"the model's scheduler is {name} without clip_sample, which then clips, so that its steps are not "
            f'Gaussian: write "clip_sample": false into {FILE}'
        )


def _check_numbers(name: str | None, written: Mapping[str, Any]) -> None:
    """Raise ValueError if the schedule's length, offset or range of betas is not a usable number."""
    steps, betas = written.get("num_train_timesteps", 1000), written.get("trained_betas")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{_says(name, 'num_train_timesteps', steps)}: it must be a whole number above 0 (in {FILE})")
    offset = written.get("steps_offset", 0)
    if not isinstance(offset, int):
        raise ValueError(f"{_says(name, 'steps_offset', offset)}: it must be a whole number (in {FILE})")
    if betas is not None and len(betas) != steps:
        raise ValueError(
            f"the model's scheduler has {len(betas)} trained_betas, and num_train_timesteps={steps}: there must be one "
            f"for each (in {FILE})"
        )
    if betas is not None or written.get("beta_schedule", "linear") not in BETA_RANGES:
        return
    for key in ("beta_start", "beta_end"):  # `ddim_table` checks the betas that follow from valid numbers
        if key in written and (not is_number(written[key]) or written[key] < 0):
            raise ValueError(f"{_says(name, key, written[key])}: it must be a number above 0 and below 1 (in {FILE})")


def _says(name: str | None, key: str, value: Any) -> str:
    return f"the model's scheduler{f' ({name})' if name and name != DDIM else ''} has {key}={value!r}"

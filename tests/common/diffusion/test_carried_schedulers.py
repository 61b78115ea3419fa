"""Schedulers of every class: steps of the DDIM or flow table equal diffusers', or the key is refused by name."""

import math
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ddpo.common.diffusion.policy import quiet_libraries
from ray_ddpo.common.diffusion.schedulers.conversion import CARRIED, check_scheduler
from ray_ddpo.common.diffusion.schedulers.ddim import ddim_table
from ray_ddpo.common.diffusion.schedulers.flow_match import flow_match_table
from tests.accepted_page import assert_accepted, assert_refused

quiet_libraries()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# The files of models as they were published.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        **BETAS,
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "SD 2.1": {
        **BETAS,
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "SDXL": {
        **BETAS,
        "_class_name": "EulerDiscreteScheduler",
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
}
AVAILABLE = tuple(name for name in CARRIED if name not in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"))


def loaded(config: dict[str, Any]) -> Any:
    """Make the scheduler as a pipeline that reads it does."""
    return getattr(diffusers, config["_class_name"]).from_config(config)


def plain_ddim(config: dict[str, Any]) -> Any:
    """Return diffusers' DDIM for it, without clipping unless the file asks for it."""
    scheduler = loaded(config)
    if isinstance(scheduler, diffusers.DDIMScheduler):
        return scheduler
    silent = {} if "clip_sample" in config else {"clip_sample": False}
    return diffusers.DDIMScheduler.from_config(scheduler.config, **silent)


def assert_steps_are_diffusers_own(config: dict[str, Any], num_steps: int, eta: float) -> None:
    theirs, ours = plain_ddim(config), ddim_table(loaded(config).config, num_steps, eta, "cpu")
    theirs.set_timesteps(num_steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(num_steps)
    latents, output, noise = (torch.randn(num_steps, 1, 2, 2, generator=generator) for _ in range(3))
    steps = torch.arange(num_steps)
    for stochastic, used in ((True, eta), (False, 0.0)):
        mean = ours.transition(latents, output, steps, stochastic).sample(noise)
        for step in {*range(min(num_steps, 5)), num_steps // 2, num_steps - 2, num_steps - 1}:
            row = slice(step, step + 1)
            timestep = int(theirs.timesteps[step])
            expected = theirs.step(output[row], timestep, latents[row], eta=used, variance_noise=noise[row]).prev_sample
            assert expected.isfinite().all(), "diffusers' own step is not finite"
            torch.testing.assert_close(mean[row], expected, rtol=2e-4, atol=2e-5 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("num_steps", [4, 50])
def test_a_published_schedule_gives_the_steps_of_diffusers_ddim(model: str, num_steps: int) -> None:
    assert_steps_are_diffusers_own(PUBLISHED[model], num_steps, 1.0)
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", PUBLISHED[model]["_class_name"]]}
    check_scheduler(index, PUBLISHED[model], flow=False)
    assert_accepted("the schedulers of Stable Diffusion 1.5, 2.1 and XL as they were published")


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("name", [name for name in AVAILABLE if "DDIM" not in name and "DDPM" not in name])
def test_a_solver_without_clip_sample_is_taken_over_with_its_betas(name: str) -> None:
    for keys in ({}, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}):
        assert_steps_are_diffusers_own({"_class_name": name, **BETAS, **keys}, 6, 1.0)
    assert_accepted(
        "a scheduler of another solver (PNDM, Euler, Heun, KDPM2, DPM++, DEIS, UniPC, SA), `clip_sample` or not"
    )


KEYS: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000, 500, 100, 7, 2000),
    "beta_start": (0.00085, 0.0001, 0.01, 0.0),
    "beta_end": (0.012, 0.02, 0.3, 1.5),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
    "trained_betas": (None, [0.01] * 1000, [0.001 + 0.0001 * step for step in range(100)]),
    "clip_sample": (False, False, True),
    "set_alpha_to_one": (False, True),
    "steps_offset": (0, 1, 3, 200, -2),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "thresholding": (False, False, True),
    "dynamic_thresholding_ratio": (0.9,),
    "clip_sample_range": (0.5,),
    "sample_max_value": (2.0,),
    "timestep_spacing": ("leading", "trailing", "linspace", "log"),
    "rescale_betas_zero_snr": (False, True),
    "skip_prk_steps": (True,),
    "use_karras_sigmas": (False, True),
    "use_exponential_sigmas": (False, True),
    "use_lu_lambdas": (False, True),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "sigma_min": (None, 0.1),
    "sigma_max": (None, 80.0),
    "use_flow_sigmas": (False, True),
    "flow_shift": (1.0, 3.0),
    "solver_order": (1, 2),
    "variance_type": (None, "fixed_large", "learned_range"),
    "lambda_min_clipped": (-math.inf, -5.1),
    "unknown_key": (1,),
}
VALUES = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in KEYS.items()})
# Some keys of most configurations; those of all at once would nearly always be refused.
FEW = st.sets(st.sampled_from(sorted(KEYS)), max_size=4).flatmap(
    lambda keys: st.fixed_dictionaries({key: st.sampled_from(KEYS[key]) for key in sorted(keys)})
)


def check_one(config: dict[str, Any], num_steps: int, eta: float) -> bool:
    """Compare with diffusers, or check that the refusal names a key. Return whether the configuration was accepted."""
    try:
        scheduler = loaded(config)
    except (ValueError, NotImplementedError, TypeError, IndexError, RuntimeError):  # diffusers refuses it
        scheduler = None
    try:
        ddim_table(scheduler.config if scheduler else config, num_steps, eta, "cpu")
    except ValueError as error:
        words = {*config, "num_steps", "clip_sample", "beta_start", "beta_end"}
        assert any(word in str(error) for word in words), error
        return False
    assert scheduler is not None, f"diffusers refuses {config}"
    assert_steps_are_diffusers_own(config, num_steps, eta)
    return True


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(AVAILABLE), keys=FEW, num_steps=st.sampled_from((2, 3, 6, 7)), eta=st.sampled_from((1.0, 0.4))
)
def test_any_configuration_gives_diffusers_steps_or_is_refused_by_name(
    name: str, keys: dict[str, Any], num_steps: int, eta: float
) -> None:
    check_one({"_class_name": name, **BETAS, "clip_sample": False, **keys}, num_steps, eta)


@pytest.mark.thorough
@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(AVAILABLE),
    keys=FEW | VALUES,
    written=st.sampled_from(({}, BETAS, BETAS | {"clip_sample": False})),
    num_steps=st.sampled_from((2, 3, 6, 7, 61, 100, 999, 1000)),
    eta=st.sampled_from((1.0, 0.4)),
)
def test_any_of_very_many_configurations_gives_diffusers_steps_or_is_refused_by_name(
    name: str, keys: dict[str, Any], written: dict[str, Any], num_steps: int, eta: float
) -> None:
    check_one({"_class_name": name, **written, **keys}, num_steps, eta)


def test_a_thousand_steps_are_taken_or_refused_with_what_stands_in_the_way() -> None:
    for spacing, offset in (("leading", 0), ("trailing", 1), ("linspace", 1)):
        config = PUBLISHED["SD 1.5"] | {"timestep_spacing": spacing, "steps_offset": offset}
        assert check_one(config, 1000, 1.0)
    assert check_one(PUBLISHED["SD 1.5"], 999, 1.0)
    for situation, config, num_steps in (
        ("`sampling.num_steps` that leads the schedule over its end", PUBLISHED["SD 1.5"], 1000),
        ("`sampling.num_steps` of which diffusers makes one step more", {"timestep_spacing": "trailing"}, 61),
        ("more steps than the model's schedule has", {"num_train_timesteps": 100}, 101),
    ):
        with pytest.raises(ValueError) as error:
            ddim_table(loaded({"_class_name": "PNDMScheduler", **BETAS, **config}).config, num_steps, 1.0, "cpu")
        assert_refused(situation, str(error.value))


REFUSED: dict[str, tuple[bool, dict[str, Any]]] = {
    "a scheduler that is not of betas (EDM, LCM, TCD, …) in a UNet's model": (
        False,
        {"_class_name": "EDMEulerScheduler"},
    ),
    "a scheduler of flow matching in a UNet's model": (
        False,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    ),
    "another scheduler than flow matching's Euler in SD3 or FLUX": (
        True,
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "Karras, exponential, beta or Lu spacing in a UNet's scheduler": (
        False,
        {"_class_name": "DPMSolverMultistepScheduler", **BETAS, "use_karras_sigmas": True},
    ),
    "noise levels of its own in a UNet's scheduler (`sigma_min`, `sigma_max`, `timestep_type`, flow sigmas)": (
        False,
        {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_type": "continuous"},
    ),
    "a scheduler that clips or thresholds": (False, {"_class_name": "DDIMScheduler", **BETAS, "thresholding": True}),
    "a scheduler that clips by default, without the key": (
        False,
        {"_class_name": "DDPMScheduler", **BETAS},
    ),
    "a scheduler without betas, which DDIM would take for others": (
        False,
        {"_class_name": "HeunDiscreteScheduler", "beta_schedule": "scaled_linear"},
    ),
    "`final_sigmas_type` that DDIM does not end with": (
        False,
        {"_class_name": "UniPCMultistepScheduler", **BETAS, "final_sigmas_type": "sigma_min"},
    ),
    "an unknown `prediction_type`, `beta_schedule` or `timestep_spacing`": (
        False,
        {"_class_name": "EulerDiscreteScheduler", **BETAS, "prediction_type": "flow_prediction"},
    ),
    "`trained_betas` of another number than `num_train_timesteps`": (
        False,
        {"_class_name": "DDIMScheduler", "clip_sample": False, "trained_betas": [0.01] * 10},
    ),
    "`invert_sigmas` or `stochastic_sampling` in SD3 or FLUX": (
        True,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True},
    ),
}


@pytest.mark.parametrize("situation", REFUSED)
def test_what_cannot_be_taken_over_is_refused_by_class_and_key(situation: str) -> None:
    flow, config = REFUSED[situation]
    index = {"_class_name": "AnyPipeline", "scheduler": ["diffusers", config["_class_name"]]}
    with pytest.raises(ValueError) as error:
        check_scheduler(index, config, flow)
    assert_refused(situation, str(error.value))
    with pytest.raises(ValueError) as again:  # the same where a model of the hub is loaded
        read = loaded(config).config
        flow_match_table(read, 4, 0.7, 16, False) if flow else ddim_table(read, 4, 1.0, "cpu")
    if "without clip_sample" not in str(error.value):
        assert str(again.value) == str(error.value)


def test_the_class_that_a_folder_names_twice_must_be_taken_over_both_times() -> None:
    index = {"scheduler": ["diffusers", "PNDMScheduler"]}
    with pytest.raises(
        ValueError, match="the model's scheduler is EDMEulerScheduler: .*takes over the schedules of DDIM"
    ):
        check_scheduler(index, {"_class_name": "EDMEulerScheduler"}, flow=False)


def test_stable_diffusions_pipeline_corrects_clip_sample_and_steps_offset_of_a_ddim() -> None:
    """Compare with the scheduler that `StableDiffusionPipeline`'s constructor corrects."""
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    for keys in ({}, {"clip_sample": True, "steps_offset": 0}):
        config = {"_class_name": "DDIMScheduler", **BETAS, **keys}
        check_scheduler(index, config, flow=False)
        scheduler = loaded(config)
        corrected = dict(scheduler.config) | {"clip_sample": False, "steps_offset": 1}
        assert ddim_table(corrected, 4, 1.0, "cpu").timesteps.tolist() == [751, 501, 251, 1]
    assert_accepted("a Stable Diffusion's DDIM with `clip_sample` true or absent, or another `steps_offset` than 1")

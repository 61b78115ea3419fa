"""Flow matching's Euler scheduler with any keys: what the flow table takes over equals diffusers' steps, the rest is refused."""

from typing import Any

import diffusers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ddpo.common.diffusion.policy import quiet_libraries
from ray_ddpo.common.diffusion.schedulers.flow_match import flow_match_table
from tests.accepted_page import assert_accepted

quiet_libraries()
FLOW_KEYS: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000, 500),
    "shift": (1.0, 3.0, 0.5, 0.0, -1.0, None),
    "use_dynamic_shifting": (True, False),
    "base_shift": (0.5, 0.1, None),
    "max_shift": (1.15, 3.0),
    "base_image_seq_len": (256, 16, 4096),
    "max_image_seq_len": (4096, 64),
    "invert_sigmas": (False, True),
    "shift_terminal": (None, 0.1, 0.0),
    "use_karras_sigmas": (False, True),
    "use_exponential_sigmas": (False, True),
    "use_beta_sigmas": (False, True),
    "time_shift_type": ("exponential", "linear", "other"),
    "stochastic_sampling": (False, True),
    "unknown_key": (1,),
}
FEW_OF_FLOW = st.sets(st.sampled_from(sorted(FLOW_KEYS)), max_size=5).flatmap(
    lambda keys: st.fixed_dictionaries({key: st.sampled_from(FLOW_KEYS[key]) for key in sorted(keys)})
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    keys=FEW_OF_FLOW, num_steps=st.sampled_from((2, 3, 6, 28)), flux=st.booleans(), tokens=st.sampled_from((16, 4096))
)
def test_any_flow_gives_diffusers_steps_or_is_refused_by_name(
    keys: dict[str, Any], num_steps: int, flux: bool, tokens: int
) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **keys}
    try:
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    except (ValueError, ImportError, TypeError):
        scheduler = None
    try:
        ours = flow_match_table(scheduler.config if scheduler else config, num_steps, 0.7, tokens, flux)
    except ValueError as error:
        assert any(key in str(error) for key in keys) or "noise levels" in str(error), error
        return
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

    assert scheduler is not None, f"diffusers refuses {config}"
    shifts = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    dynamic = scheduler.config["use_dynamic_shifting"]
    mu = {"mu": calculate_shift(tokens, *(scheduler.config[key] for key in shifts))} if dynamic else {}
    sigmas = {"sigmas": torch.linspace(1.0, 1 / num_steps, num_steps, dtype=torch.float64).tolist()} if flux else {}
    retrieve_timesteps(scheduler, num_steps, "cpu", **sigmas, **mu)
    generator = torch.Generator().manual_seed(num_steps)
    latents, output = (torch.randn(num_steps, 1, 2, 2, generator=generator) for _ in range(2))
    mean = ours.transition(latents, output, torch.arange(num_steps), stochastic=False).mean
    torch.testing.assert_close(ours.timesteps, scheduler.timesteps)
    assert ours.std().isfinite().all() and ours.std()[-1] == 0
    for step, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = step
        expected = scheduler.step(output[step], timestep, latents[step]).prev_sample
        torch.testing.assert_close(mean[step], expected, rtol=1e-5, atol=1e-6)
    assert_accepted("any shift, spacing and terminal of flow matching's Euler scheduler in SD3 or FLUX")

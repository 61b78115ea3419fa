"""Try a user's own model family before the first round: call each method once on two rows and check its result.

An error names class, method, what was expected and what was returned. The project's own families are tested elsewhere.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.execution import refuse_graphs_without_gpu
from ray_ddpo.common.diffusion.guidance import is_shared
from ray_ddpo.common.diffusion.host_loading import read_all_weights
from ray_ddpo.common.diffusion.lora.adapters import load_weights, read_weights, trained_parameters
from ray_ddpo.common.diffusion.lora.files import lora_file
from ray_ddpo.common.diffusion.policy import Conditioning, Policy, PolicyConfig, Role, select_rows
from ray_ddpo.common.diffusion.rollout import image_noise
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps
from ray_ddpo.common.diffusion.tensor_checks import check_tensor, described, refuse_unless
from ray_ddpo.common.diffusion.trained_weights import stored_weights
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.model_files.weight_files import network_folder
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.role_loading import loading
from ray_ddpo.common.runtime import undisturbed
from ray_ddpo.common.user_code.blame import blamed, call, is_users_own

ROWS = 2  # a method that takes all rows for the first would pass with one
SAME = 1e-3  # of the largest number: rounding alone changes a mean by less


def load_checked(config: PolicyConfig, device: str, sampling: SamplingTable, role: Role) -> Policy:
    """Load a recipe's policy.

    Raises:
        ValueError: A file is damaged, or the user's own family raises or returns no usable policy.
        PartNotLoaded: Anything else went wrong.
    """
    refuse_graphs_without_gpu(config, device)
    with loading(f"policy.model is {config.model!r}", config.needs):
        if is_users_own(config, POLICIES):
            read_all_weights()
            policy = call(config, "load", device, sampling, role)
            _check_fields(policy, f"{type(config).__name__}.load returned", sampling, config.has_frames)
            return policy
        return config.load(device, sampling, role)


def _check_fields(policy: Any, returned: str, sampling: SamplingTable, has_frames: bool) -> None:
    """Check the fields that every policy must have, and those of a video's."""
    name = type(policy).__name__
    refuse_unless(isinstance(policy, Policy), f"{returned} {described(policy)}", "a ray_ddpo.Policy")
    lacking = [field for field in Policy.__annotations__ if not hasattr(policy, field)]
    refuse_unless(not lacking, f"{returned} a {name} without {', '.join(lacking)}", "all fields of Policy")
    network, shape, steps = policy.network, policy.latent_shape, policy.num_steps
    refuse_unless(isinstance(network, nn.Module), f"{name}.network is {described(network)}", "a torch.nn.Module")
    sides = "C, F, H, W, as has_frames is true" if has_frames else "C, H, W, and of a video, has_frames = True"
    whole = isinstance(shape, tuple) and all(isinstance(side, int) and side > 0 for side in shape)
    sized = whole and len(shape) in ((4,) if has_frames else (2, 3))  # two of packed tokens
    refuse_unless(sized, f"{name}.latent_shape is {shape!r}", f"a tuple of positive numbers, {sides}")
    refuse_unless(steps == sampling.num_steps, f"{name}.num_steps is {steps!r}", f"{sampling.num_steps}")
    refuse_unless(trained_parameters(network), f"{name}.network has no parameter with a gradient", "make_trainable")


def try_sampling(config: PolicyConfig, policy: Policy, prompts: Sequence[str]) -> tuple[int, int] | None:
    """Take a user's own policy from prompts to images, and check what each method returns.

    Returns:
        Height and width of its images; None if there was nothing to try.

    Raises:
        ValueError: A method raises, or returns something other than it must.
    """
    if not is_users_own(config, POLICIES) or not prompts:
        return None
    with undisturbed(), torch.no_grad():
        rows = _encoded(policy, [prompts[row % len(prompts)] for row in range(ROWS)])
        noise = next(image_noise(list(range(ROWS)), policy.latent_shape)).to(policy.device)
        latents = call(policy, "initial_latents", noise)
        check_tensor(f"{type(policy).__name__}.initial_latents returned", latents, tuple(noise.shape), None)
        _try_transition(policy, latents, rows)
        _try_denoise(policy, latents, noise, rows)
        if config.takes_other_steps:
            _try_other_steps(policy, latents, rows)
        return _try_decode(policy, latents, config.has_frames)


def _try_decode(policy: Policy, latents: Tensor, has_frames: bool) -> tuple[int, int]:
    """Check what `decode` returns. Return height and width of an image or a frame."""
    images: Any = call(policy, "decode", latents)
    rows = (ROWS, policy.num_frames) if has_frames else (ROWS,)
    expected = f"uint8 of shape ({', '.join(map(str, rows))}, height, width, 3), from 0 to 255"
    expected += f": num_frames is {policy.num_frames}" if has_frames else ""
    shaped = isinstance(images, Tensor) and images.shape[:-3] == rows and images.shape[-1] == 3
    found = f"{type(policy).__name__}.decode returned {described(images)}"
    refuse_unless(shaped and images.dtype == torch.uint8, found, expected)
    height, width = images.shape[-3:-1]
    return height, width


def try_files(config: PolicyConfig, policy: Policy) -> None:
    """Save the trained weights of a user's own policy, read them back, and restore the policy's weights.

    Raises:
        ValueError: The files cannot be read safely, or do not give the same weights back.
    """
    if not is_users_own(config, POLICIES):
        return
    name, before = type(policy).__name__, read_weights(policy.network, 0)
    with tempfile.TemporaryDirectory(prefix="ddpo-trial-") as scratch:
        folder = Path(scratch)
        written = call(policy, "save", folder)
        inside = isinstance(written, Path) and written.exists() and written.is_relative_to(folder)
        expected = "the path of what it wrote, in the folder given"
        refuse_unless(inside, f"{name}.save returned {described(written)}", expected)
        with blamed(f"{name}.save wrote files that cannot be read: reading them"):
            stored = stored_weights(folder, before.manifest, 0)
            place = lora_file(folder) if config.train == "lora" else network_folder(folder)
        same, where = stored.fingerprint == before.fingerprint, f"{name}.save wrote other numbers than the network has"
        refuse_unless(same, where, "its trained weights to the last bit")
        try:
            with torch.no_grad():
                for parameter in trained_parameters(policy.network).values():
                    parameter.add_(1)
            call(policy, "restore", place)
            after = read_weights(policy.network, 0)
        finally:
            load_weights(policy.network, before)
    same, kept = after.fingerprint == before.fingerprint, before.arrays()
    lost = [key for key, array in after.arrays().items() if key not in kept or not np.array_equal(array, kept[key])]
    where = f"{name}.restore gave other weights than {name}.save wrote, at {lost[:3] or 'other names'}"
    refuse_unless(same, where, "every trained parameter back")


def _encoded(policy: Policy, prompts: list[str]) -> Conditioning:
    """Encode the prompts, check each tensor, and return one row per prompt."""
    name, conditioning = f"{type(policy).__name__}.encode", call(policy, "encode", prompts)
    named = isinstance(conditioning, dict) and conditioning and all(isinstance(key, str) for key in conditioning)
    refuse_unless(named, f"{name} returned {described(conditioning)}", "a dict of tensors by name, at least one")
    for key, value in conditioning.items():
        count = 1 if is_shared(key) else len(prompts)
        what = "one row for all prompts" if count == 1 else f"{count} rows for {count} prompts"
        fits = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
        refuse_unless(fits, f"{name} returned {key!r} as {described(value)}", f"a tensor with {what}")
        finite = bool(value.isfinite().all()) and value.device.type == torch.device(policy.device).type
        refuse_unless(finite, f"{name} returned {key!r} as {described(value)}", f"finite numbers on {policy.device}")
    return select_rows(conditioning, torch.arange(len(prompts), device=policy.device))


def _try_transition(policy: Policy, latents: Tensor, rows: Conditioning) -> None:
    """Check `transition` with one step index per row.

    Stochastic steps need a std above 0, equal inputs equal means, rows no other rows, and deterministic steps std 0.
    """
    name, where = f"{type(policy).__name__}.transition", f"{type(policy).__name__}.stochastic_steps"
    with blamed(where):
        stochastic: Any = policy.stochastic_steps
    listed = isinstance(stochastic, list) and stochastic
    known = listed and all(isinstance(step, int) and 0 <= step < policy.num_steps for step in stochastic)
    expected = f"a list of the stochastic steps, of 0 to {policy.num_steps - 1}"
    refuse_unless(known, f"{where} is {stochastic!r}", expected)
    steps = torch.tensor([stochastic[0], stochastic[-1]], device=policy.device)
    transition = _transition(policy, (latents, steps, rows, True))
    positive = bool((transition.std > 0).all())
    where = f"{name} gave a std of {transition.std.tolist()} at the steps {steps.tolist()}, which stochastic_steps has"
    refuse_unless(positive, where, "above 0 at each of them")
    again = _transition(policy, (latents, steps, rows, True))
    expected = "equal means for equal inputs: no state, no dropout (network.eval()), no random numbers"
    refuse_unless(_close(transition, again), f"{name} gave two means for one input", expected)
    last = {key: value[1:] for key, value in rows.items()}
    alone = _transition(policy, (latents[1:], steps[1:], last, True))
    row = Transition(transition.mean[1:], transition.std[1:])
    expected = "each row at its own step and with its own conditioning"
    refuse_unless(_close(row, alone, 50.0), f"{name} gave a row another mean or std among others than alone", expected)
    deterministic_std = _transition(policy, (latents, steps, rows, False)).std
    where = f"{name} with stochastic=False gave a std of {deterministic_std.tolist()}"
    refuse_unless(not deterministic_std.any(), where, "0, and the mean of the deterministic step")


def _transition(policy: Policy, arguments: tuple[Any, ...]) -> Transition:
    name, latents = f"{type(policy).__name__}.transition returned", arguments[0]
    transition = call(policy, "transition", *arguments)
    refuse_unless(isinstance(transition, Transition), f"{name} {described(transition)}", "a Transition of mean and std")
    check_tensor(f"{name} a mean of", transition.mean, tuple(latents.shape), torch.float32)
    check_tensor(f"{name} a std of", transition.std, (len(latents),), torch.float32)
    return transition


def _try_denoise(policy: Policy, latents: Tensor, noise: Tensor, rows: Conditioning) -> None:
    """Check prediction and target of `denoise`. A policy may leave the method unimplemented."""
    timesteps = torch.tensor([0, policy.num_train_timesteps // 2], device=policy.device)
    try:
        both = call(policy, "denoise", latents, noise, timesteps, rows)
    except ValueError as error:
        if isinstance(error.__cause__, NotImplementedError):  # only algorithms that train on final images need it
            return
        raise
    name = f"{type(policy).__name__}.denoise returned"
    refuse_unless(isinstance(both, tuple) and len(both) == 2, f"{name} {described(both)}", "prediction and target")
    for what, value in zip(("a prediction of", "a target of"), both, strict=True):
        check_tensor(f"{name} {what}", value, tuple(latents.shape), torch.float32)


def _try_other_steps(policy: Policy, latents: Tensor, rows: Conditioning) -> None:
    """Check that `denoising_steps` and `predict` together make the deterministic step of `transition`."""
    name = type(policy).__name__
    table: Any = call(policy, "denoising_steps", SamplingTable(num_steps=policy.num_steps))
    refuse_unless(isinstance(table, DenoisingSteps), f"{name}.denoising_steps returned {described(table)}", "steps")
    steps = torch.tensor([0, policy.num_steps - 1], device=policy.device)
    output = call(policy, "predict", latents, table.timesteps[steps], rows)
    check_tensor(f"{name}.predict returned", output, tuple(latents.shape), None)
    with blamed(f"{name}.denoising_steps"):
        made = table.transition(latents, output, steps, False)
    own = _transition(policy, (latents, steps, rows, False))
    where = f"{name}.predict and denoising_steps make another deterministic step than transition"
    refuse_unless(_close(made, own), where, "the same mean, with standard deviation 0")


def _close(one: Transition, other: Transition, times: float = 1.0) -> bool:
    pairs = ((one.mean, other.mean), (one.std, other.std))
    return all(bool((a - b).abs().max() <= times * SAME * b.abs().max()) for a, b in pairs)

"""Sample a few trajectories as a sampler does, and score them again as the learner does and in other ways."""

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ray_ddpo.common.diffusion.lora.adapters import read_weights, trained_parameters
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.policy_trial import load_checked, try_sampling
from ray_ddpo.common.diffusion.prompt_lengths import cut_prompts_in_words
from ray_ddpo.common.diffusion.rollout import inputs_of, sample_trajectories, score
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps, output_sensitivity
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RoleTable, RuntimeTable
from ray_ddpo.common.runtime import settle
from ray_ddpo.common.schedule import round_tasks, transition_order
from ray_ddpo.common.trajectory import DTYPES, TaskReport, TrainBatch, Trajectory
from ray_ddpo.deploy.commands.doctor.ratio_noise import Kind, Noise, RatioComparison
from ray_ddpo.deploy.driver.components import Components, components_of, with_reward_gradients
from ray_ddpo.deploy.driver.trial_prompts import checked_prompts, trial_prompts
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient
from ray_ddpo.learner.learning_trial import try_learning
from ray_ddpo.learner.optimization.checkpointing import fit_micro_batches, loadable
from ray_ddpo.learner.restart_check import restart_error
from ray_ddpo.learner.round_data.reference_passes import log_probs_under
from ray_ddpo.learner.round_data.restarts import restarts_of
from ray_ddpo.learner.round_data.transitions import RoundTransitions, indices_of, micro_batches, round_transitions

TRAINED = 0.02  # standard deviation of the noise added to a merged adapter's weights
IMAGES = 4  # of the run's first task; with all trained steps, hundreds of transitions
KERNELS = {
    "math attention": SDPBackend.MATH,
    "memory-efficient attention": SDPBackend.EFFICIENT_ATTENTION,
    "flash attention": SDPBackend.FLASH_ATTENTION,
    "cuDNN attention": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class TrialSample:
    """Trajectories of a sampler with their weights. If latents are stored in half precision, also in float32."""

    as_stored: Trajectory
    in_float32: Trajectory
    weights: PolicyWeights
    cut_prompts: str | None = None  # a warning if prompts are longer than the text encoders read


def runtime_of(table: RoleTable, runtime: RuntimeTable) -> RuntimeTable:
    """Return the recipe's `[runtime]` for a role: without num_gpus, an actor computes on the CPU."""
    return runtime if table.num_gpus else runtime.model_copy(update={"device": "cpu"})


def sample_some(recipe: Recipe) -> TrialSample:
    """Sample the first images of the run's first task, with all steps that may be trained on."""
    components = components_of(recipe)
    tried_on = [prompt.text for prompt in trial_prompts(components)]
    task = round_tasks(recipe, 0, components.prompts.load())[0]
    device = settle(runtime_of(recipe.samplers, recipe.runtime))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        policy = load_checked(components.policy, device, recipe.sampling, "sampler")
        try_sampling(components.policy, policy, tried_on)
        weights = _trained_a_little(policy)
    prompts_checked = checked_prompts(components)
    cut = cut_prompts_in_words(policy.text_readers(), prompts_checked, recipe.sampling, policy.guided_above)
    if components.policy.is_compiled("sampler"):
        policy.compile(recipe.sampling.batch_size)
    policy.load_weights(weights)
    sampling = recipe.sampling.model_copy(update={"timestep_fraction": 1.0, "sde_window": None})
    prompts, seeds = [prompt.text for prompt in task.prompts[:IMAGES]], list(task.seeds[:IMAGES])
    inputs = inputs_of(policy, task.prompts[:IMAGES])
    as_stored = sample_trajectories(policy, prompts, seeds, sampling, inputs=inputs)
    in_float32 = (
        as_stored
        if sampling.latents_dtype == "float32"
        else sample_trajectories(
            policy, prompts, seeds, sampling.model_copy(update={"latents_dtype": "float32"}), inputs=inputs
        )
    )
    return TrialSample(as_stored, in_float32, weights, cut)


@torch.no_grad()
def _trained_a_little(policy: Policy) -> PolicyWeights:
    """Return weights as after some rounds: new adapters are zero, so merging and rounding would lose nothing."""
    if policy.merged:
        for parameter in trained_parameters(policy.network).values():
            parameter.add_(TRAINED * torch.randn_like(parameter))
    return read_weights(policy.network, 0)


def score_again(recipe: Recipe, sampled: TrialSample) -> Noise:
    """Score the trajectories again in every way that this device supports."""
    device, components = settle(runtime_of(recipe.learner, recipe.runtime)), components_of(recipe)
    config = components.policy
    policy = load_checked(loadable(config), device, recipe.sampling, "learner")
    algorithm = components.algorithm
    if algorithm.restarts_per_image is not None:
        algorithm = with_reward_gradients(components)
        algorithm.load(policy, config)  # the decoder and the rewards, which are tried too
    try_learning(policy, config, algorithm, recipe)
    size, _ = fit_micro_batches(policy, config, algorithm, recipe)
    policy.load_weights(sampled.weights)
    unavailable: list[str] = []
    levels = _restart_levels(policy, algorithm, components, sampled.as_stored)
    comparisons = tuple(_comparisons(policy, recipe, sampled, size, unavailable))
    if config.is_compiled("learner"):  # last, else every other comparison would compile again
        policy.compile(size)
        compiled = _as_the_learner(policy, recipe, sampled.as_stored, size, is_compiled=True)
        comparisons = (*map(_not_compiled, comparisons), compiled)
    return Noise(
        comparisons,
        tuple(unavailable),
        int(np.prod(policy.latent_shape)),
        _sensitivity(policy, np.unique(sampled.as_stored.steps.cpu().numpy())),
        device,
        levels,
    )


def _restart_levels(policy: Policy, algorithm: Algorithm, components: Components, path: Trajectory) -> float | None:
    """Return by how many grey levels the learner's last steps miss the sampler's images; None without restarts."""
    if not isinstance(algorithm, RewardGradient):
        return None
    recipe, count = components.recipe, len(path.steps)
    task = round_tasks(recipe, 0, components.prompts.load())[0]
    task = dataclasses.replace(task, prompts=task.prompts[:count], seeds=task.seeds[:count], window=None)
    batch = TrainBatch(0, (TaskReport(task, "", 0, 0, 0.0),), np.full(count, np.nan))  # rewards are not compared
    transitions = round_transitions((path,), batch.advantages, policy.device)
    restarts = restarts_of(algorithm.restarts_per_image, batch, transitions, policy, recipe.sampling)
    found = restart_error(policy, algorithm, restarts, batch)
    assert found is not None, "no image is dropped"
    return found.grey_levels


def _comparisons(
    policy: Policy, recipe: Recipe, sampled: TrialSample, size: int, unavailable: list[str]
) -> Iterator[RatioComparison]:
    """Yield the comparisons. Names of unsupported attention kernels are appended to `unavailable`."""
    path, stored = sampled.as_stored, recipe.sampling.latents_dtype
    transitions = round_transitions((path,), np.zeros(len(path.steps)), policy.device)
    yield _compared(f"as sampled, {stored} as stored", "other", path, score(policy, path))
    yield _as_the_learner(policy, recipe, path, size)
    single = round_transitions((_first_image(path),), np.zeros(1), policy.device)
    yield _compared("one transition at a time", "other", _first_image(path), _in_batches(policy, recipe, single, 1))
    for name, kernel in KERNELS.items():
        try:
            with sdpa_kernel(kernel), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch explains at length why a kernel is not available
                log_probs = _in_batches(policy, recipe, transitions, size)
        except RuntimeError:
            unavailable.append(name)
            continue
        yield _compared(name, "other", path, log_probs)
    for dtype in ("float16", "bfloat16") if stored == "float32" else (stored,):
        path = _rounded(sampled.in_float32, DTYPES[dtype])
        rounded = round_transitions((path,), np.zeros(len(path.steps)), policy.device)
        log_probs = _in_batches(policy, recipe, rounded, size)
        yield _compared(f"rounded to {dtype} once scored", "rounded", path, log_probs)


def _as_the_learner(
    policy: Policy, recipe: Recipe, path: Trajectory, size: int, is_compiled: bool = False
) -> RatioComparison:
    transitions = round_transitions((path,), np.zeros(len(path.steps)), policy.device)
    log_probs = _in_batches(policy, recipe, transitions, size, is_compiled)
    return _compared(f"learner's micro-batches of {size}", "run", path, log_probs)


def _not_compiled(comparison: RatioComparison) -> RatioComparison:
    kind: Kind = "other" if comparison.kind == "run" else comparison.kind
    return dataclasses.replace(comparison, name=f"{comparison.name}, not compiled", kind=kind)


def _compared(name: str, kind: Kind, path: Trajectory, log_probs: torch.Tensor) -> RatioComparison:
    difference = log_probs.cpu() - path.log_probs.cpu()
    return RatioComparison(name, kind, difference.numpy(), path.steps.cpu().numpy())


def _in_batches(
    policy: Policy, recipe: Recipe, transitions: RoundTransitions, size: int, is_compiled: bool = False
) -> torch.Tensor:
    """Return log-probs [N, W], computed in the learner's order of images and steps."""
    images = torch.from_numpy(transition_order(recipe.seed, 0, 0, transitions.num_images))
    batches = micro_batches(indices_of(images, transitions.positions(0)), size)
    return log_probs_under(policy, transitions, batches, is_compiled)


def _first_image(path: Trajectory) -> Trajectory:
    """Return the first image's trajectory, which is enough if each transition is a separate forward pass."""
    names = ("prompt_index", "steps", "log_probs", "latents", "next_latents", "final_latents")
    names += ("start_steps", "start_latents") if path.start_steps is not None else ()
    return dataclasses.replace(path, **{name: getattr(path, name)[:1] for name in names})


def _rounded(path: Trajectory, dtype: torch.dtype) -> Trajectory:
    """Round the latents as storage would, and keep the log-probs from before rounding."""
    return dataclasses.replace(path, latents=path.latents.to(dtype), next_latents=path.next_latents.to(dtype))


def _sensitivity(policy: Policy, steps: np.ndarray) -> dict[int, float]:
    of_path = getattr(policy, "steps", None)
    if not isinstance(of_path, DenoisingSteps):
        return {}
    of_all = output_sensitivity(of_path)
    return {int(step): float(of_all[step]) for step in steps}

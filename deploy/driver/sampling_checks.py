"""Refuse ways of saving network calls that the algorithm, the model family or its schedule cannot take."""

from ray_ddpo.common.diffusion.loading.config_keys import check_steps
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.policy_gradient import RatioPolicyGradient

# Of the policy that sampled a round: the learner computes them under the weights of one version.
BEHAVIOR_COLUMNS = {"behavior_means", "old_predictions", "old_errors"}


def check_saved_calls(recipe: Recipe, policy: PolicyConfig, algorithm: Algorithm) -> None:
    """Check that deterministic steps in training go with the algorithm and the model family.

    Raises:
        ValueError: The algorithm learns from the log-probs of all steps, or the family takes its own steps only.
    """
    sampling, own = recipe.sampling, recipe.evaluation.own_sampling
    fast = {"solver": sampling.solver, "cache_interval": sampling.cache_interval}
    given = {f"sampling.{key}": value for key, value in fast.items() if value not in ("first_order", 1)}
    given |= {"sampling.deterministic": True} if sampling.deterministic else {}
    reads_log_probs = algorithm.noised_samples_per_image is None and algorithm.restarts_per_image is None
    if given and sampling.sde_window is None and reads_log_probs:
        (key, value), name = next(iter(given.items())), type(algorithm).__name__
        raise ValueError(
            f"{key} is {value!r}, and {name} learns from the log-probs of all steps, which must then be the network's "
            "own and stochastic: give sampling.sde_window, so that the steps outside of it are deterministic, or leave "
            "the key out"
        )
    given |= {f"evaluation.{key}": value for key, value in own.items()}
    if given and not policy.takes_other_steps:
        key, value = next(iter(given.items()))
        raise ValueError(
            f"{key} is {value!r}, and {type(policy).__name__} takes its own steps only, as it says with "
            "takes_other_steps = False: leave the key out, or give the family denoising_steps and predict"
        )


def check_unguided(policy: PolicyConfig, algorithm: Algorithm) -> None:
    """Check that the family predicts noised samples without guidance, if the algorithm asks for it.

    Raises:
        ValueError: It does not.
    """
    if not algorithm.guides_denoising and not policy.denoises_unguided:
        raise ValueError(
            f"algorithm.guided is false, and {type(policy).__name__} denoises with guidance only, as it says with "
            "denoises_unguided = False: leave the key out, or give sampling.guidance_scale = 1"
        )


def check_replay(recipe: Recipe, algorithm: Algorithm) -> None:
    """Check that earlier rounds can be trained on again with exact ratios, if the recipe asks for it.

    Raises:
        ValueError: The algorithm takes no ratio to stored log-probs, or needs more of an earlier round than a resumed run
            can make again.
    """
    if not recipe.learner.replay_rounds:
        return
    given, name = f"learner.replay_rounds is {recipe.learner.replay_rounds}", type(algorithm).__name__
    if not isinstance(algorithm, RatioPolicyGradient):
        raise ValueError(
            f"{given}, and {name} takes no ratio to the log-probs of the policy that sampled: give an algorithm that does, "
            "such as grpo, or 0"
        )
    if columns := sorted(BEHAVIOR_COLUMNS & algorithm.columns):
        raise ValueError(
            f"{given}, and {name} needs {columns[0]} of one policy, but several policies sampled the images: leave "
            'off_policy.max_drift_nats out; of an algorithm that compares means, give off_policy.ratio = "proximal"'
        )
    if algorithm.advantages.kind == "per_prompt":
        raise ValueError(
            f"{given} and algorithm.advantages.kind 'per_prompt', whose statistics a resumed run has in their last state "
            'only: give "group" or "round"'
        )
    if recipe.learner.parts_per_round > 1:
        raise ValueError(
            f"{given} and learner.parts_per_round {recipe.learner.parts_per_round}: earlier rounds are added to a complete "
            "round; give one of the two"
        )


def check_kl_reward(recipe: Recipe, policy: PolicyConfig) -> None:
    """Check that samplers can measure the KL of a trajectory to the pretrained model, if the recipe asks for it.

    Raises:
        ValueError: samplers have no adapters to switch off, or no step is stochastic.
    """
    sampling, given = recipe.sampling, f"sampling.kl_reward is {recipe.sampling.kl_reward:g}"
    if not sampling.kl_reward:
        return
    why = "the pretrained model is the network with its adapters switched off"
    if policy.train == "full":
        raise ValueError(f'{given} and policy.train "full": {why}; give policy.train = "lora", or leave it out')
    if policy.merge_adapters:
        raise ValueError(f"{given} and policy.merge_adapters true: {why}; give one of the two")
    if policy.is_compiled("sampler"):
        raise ValueError(
            f'{given} and policy.compile "{policy.compile}": a compiled sampler\'s adapters stay on; give '
            'policy.compile = "none", or algorithm.kl_coef'
        )
    if sampling.trains_no_steps:
        why = "deterministic is true" if sampling.deterministic else "there is a solver or a cache and no sde_window"
        raise ValueError(
            f"{given}, and every step is deterministic, because {why}: only stochastic steps have a KL; give "
            "sampling.sde_window, or leave kl_reward out"
        )


def check_held_out_steps(recipe: Recipe, policy: PolicyConfig) -> None:
    """Check that the model's schedule has the steps of held-out images, as far as files tell.

    Raises:
        ValueError: `evaluation.num_steps` is a number of steps that the schedule does not have.
    """
    if recipe.evaluation.num_steps is None or not isinstance(policy, DiffusersConfig):
        return
    try:
        check_steps(policy, recipe.held_out_sampling)
    except ValueError as error:
        raise ValueError(f"evaluation.num_steps is {recipe.evaluation.num_steps}: {error}") from error

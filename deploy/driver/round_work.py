"""Operations of a recipe's sampling and learning per image, counted, and the load that they are for a round."""

from dataclasses import dataclass

from ray_ddpo.common.balance import RoundLoad
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.memory.network_work import ASSUMED_BOTH, NetworkWork
from ray_ddpo.common.diffusion.memory.sizes import PolicySizes
from ray_ddpo.common.diffusion.memory.sizes_cache import sizes_cache
from ray_ddpo.common.diffusion.network_calls import mean_calls_per_image
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import reward_pools
from ray_ddpo.common.user_code.blame import call_if_own
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.gpu_layout import device_of
from ray_ddpo.deploy.driver.sampling_checks import BEHAVIOR_COLUMNS
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.coupled import CoupledForwardProcess
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient

# Columns under the weights before the round's first optimizer step.
FIRST_UPDATE_COLUMNS = {"proximal_log_probs", "proximal_means"}
LATE_VERSION = 10**6  # by then a moving average of weights differs from the trained ones


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """Floating-point operations per sampled image. Scoring, evaluations and the learner's checks are not in them."""

    sampling: float  # denoising and decoding
    decoding: float  # of that
    calls: float  # of the network, while an image is sampled; the mean over positions of the SDE window
    learning: float  # forward and backward passes, re-computation, and passes for precomputed columns
    is_counted: bool  # otherwise they are in forward passes of one row, at 1 : 2.13 for forward and with backward

    def sampling_with(self, calls: float) -> float:
        """Return the operations of sampling an image that calls the network `calls` times."""
        return (self.sampling - self.decoding) * calls / self.calls + self.decoding


def image_work(components: Components, sizes: PolicySizes) -> ImageWork:
    """Return the operations per image. A family that cannot be counted is taken to be like Stable Diffusion 1.5."""
    recipe, algorithm = components.recipe, components.algorithm
    guided = 2 if recipe.sampling.is_guided else 1
    row = sizes.work
    forward, both = (row.forward, row.both) if row else (1.0, ASSUMED_BOTH)
    branches, decoding = (row.branches, row.decoding) if row else (guided, 0.0)
    recomputed = forward if components.policy.gradient_checkpointing is True else 0.0
    calls, fraction = mean_calls_per_image(recipe), algorithm.images_learned_from(recipe) / recipe.images_per_round
    transitions = trained_transitions(algorithm, recipe, sizes.stochastic_steps)
    passes = column_passes(algorithm, recipe)
    learning = transitions * (both + recomputed) + transitions / recipe.learner.inner_epochs * passes * forward
    decoded = 0.0
    if isinstance(algorithm, RewardGradient):  # rewards are not counted, here and on reward workers
        again = 1 if algorithm.recompute else 0
        again_and_reference = again + (1 if algorithm.kl_coef else 0)
        each = both + recomputed + again_and_reference * forward
        learning = transitions * algorithm.passes_per_transition(recipe) * each
        decoded = transitions * (2 + again) * decoding  # a frozen decoder's backward pass costs as much as its forward
    learning_branches = branches if algorithm.guides_denoising else 1
    return ImageWork(
        sampling=float(branches * calls * forward + decoding),
        calls=calls,
        decoding=float(decoding),
        learning=float(fraction * (learning_branches * learning + decoded)),
        is_counted=isinstance(row, NetworkWork),
    )


def trained_transitions(algorithm: Algorithm, recipe: Recipe, stochastic_steps: int) -> int:
    """Return the forward and backward passes per image that is learned from, over all inner epochs."""
    return algorithm.transitions_per_image(recipe, stochastic_steps) * recipe.learner.inner_epochs


def column_passes(algorithm: Algorithm, recipe: Recipe) -> float:
    """Return the forward passes that precomputed columns cost, per transition of one inner epoch.

    A column costs no pass for the first optimizer step if that step's own pass is under the same weights. Noised
    samples differ between inner epochs, so each epoch's need passes of their own.
    """
    epochs, noised = recipe.learner.inner_epochs, algorithm.noised_samples_per_image is not None
    part = algorithm.images_learned_from(recipe) / recipe.learner.parts_per_round
    steps = max(1.0, part / recipe.learner.images_per_step)  # of an inner epoch
    items = float(epochs) if noised else 1.0
    without_first = items if epochs > 1 and not noised else items - 1 / steps
    same_weights = recipe.max_policy_lag == 0 and algorithm.ema_decay(LATE_VERSION) is None
    passes = 0.0
    # A loss that compares groups takes its slopes from a pass before each step, if ranks or micro-batches part groups.
    if isinstance(algorithm, CoupledForwardProcess):
        size, group = recipe.learner.micro_batch_size, algorithm.images_compared(recipe.prompts.images_per_prompt)
        parted = recipe.learner.world_size > 1 or size == "auto" or size % group != 0
        passes += epochs if parted else 0
    for column in algorithm.columns:
        is_own = column in FIRST_UPDATE_COLUMNS or (column in BEHAVIOR_COLUMNS and same_weights)
        passes += without_first if is_own else items
    return passes


def round_load(components: Components, sizes: PolicySizes, work: ImageWork, rate: float = 1.0) -> RoundLoad:
    """Return a round's load on GPUs that compute `rate` operations a second. Scoring is not known, and so 0."""
    recipe = components.recipe
    sampling, learner = recipe.sampling, recipe.learner
    return RoundLoad(
        tasks=sampling.batches_per_round,
        sample=sampling.batch_size * work.sampling / rate,
        learn=recipe.images_per_round * work.learning / rate,
        reward_workers=sum(pool.table.count for pool in reward_pools(recipe)),
        lag=recipe.max_policy_lag,
        parts=learner.parts_per_round,
        images_per_step=learner.images_per_step,
        transitions_per_image=components.algorithm.transitions_per_image(recipe, sizes.stochastic_steps),
        micro_batch_size=None if learner.micro_batch_size == "auto" else learner.micro_batch_size,
    )


def counted_work(components: Components) -> ImageWork | None:
    """Return the counted operations per image for the metrics of a run.

    The sizes cache is used, so that a model is counted once. None: the family cannot be counted.
    """
    policy, recipe = components.policy, components.recipe
    try:
        with sizes_cache():
            sizes = call_if_own(policy, POLICIES, "sizes", recipe.sampling, device_of(recipe))
    except ValueError:  # its `ddpo plan` fails; a run does not need it
        return None
    return image_work(components, sizes) if sizes.work else None

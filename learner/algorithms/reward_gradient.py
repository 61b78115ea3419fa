"""The base of algorithms that propagate the gradient of a differentiable reward through the last denoising steps."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from pydantic import Field, PrivateAttr
from torch import Tensor

from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.differentiable_reward import DifferentiableReward, HasGradient, weighted_sum
from ray_ddpo.common.diffusion.lora.adapters import adapted_layers
from ray_ddpo.common.diffusion.memory.restart_memory import with_restarts
from ray_ddpo.common.diffusion.memory.sizes import PolicySizes
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import NoisedBatch, RestartBatch, TransitionBatch
from ray_ddpo.common.user_code.blame import call
from ray_ddpo.common.user_code.sources import is_of_the_project
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.algorithm import REWARD_TERM, Algorithm, TransitionLoss
from ray_ddpo.learner.algorithms.denoising_gradient import denoised, recomputed, steps_of
from ray_ddpo.learner.algorithms.losses import sum_of
from ray_ddpo.learner.sharding.layout import shards_weights


class RewardGradient(Algorithm, ABC):
    """Minimize a function of the reward of images that the learner denoises again from stored latents.

    Samplers and reward workers do the same work as for other algorithms. The learner holds the decoder and the rewards
    too, since the gradient passes through both.
    """

    loss_scale: float = Field(default=1.0, gt=0)
    """Factor of the loss. With Adam it matters beside `learner.max_grad_norm` only."""
    recompute: bool = True
    """Re-compute the activations of each step and of the decoder in the backward pass: less memory, same bits."""
    restart_tolerance: float | None = Field(default=None, gt=0)
    """Largest accepted mean difference between the learner's and the sampler's image, in grey levels of 255.

    By default 1 in float32, else 8.
    """
    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the mean squared difference between predictions and the pretrained model's, as in DRaFT+.

    A mean over latent elements and over the steps with gradients. It needs LoRA, and one more forward pass a step.
    """
    _rewards: dict[str, tuple[float, HasGradient]] = PrivateAttr(default_factory=dict)
    _loaded: dict[str, tuple[float, DifferentiableReward]] = PrivateAttr(default_factory=dict)
    _prompts: tuple[Prompt, ...] = PrivateAttr(default=(Prompt(""),))
    _most_steps: int = PrivateAttr(default=1)

    @property
    def restarts_per_image(self) -> int:
        return 1

    @property
    def trial_prompts(self) -> tuple[Prompt, ...]:
        """Return prompts of the run, for synthetic batches."""
        return self._prompts

    @property
    def most_steps(self) -> int:
        """Return the most steps that a restart takes."""
        return self._most_steps

    @property
    def users_rewards(self) -> list[tuple[str, DifferentiableReward]]:
        """Return the loaded rewards that run a user's code, each with the name that errors give it."""
        named = [(reward.users_code, self._loaded[name][1]) for name, (_, reward) in self._rewards.items()]
        return [(who, function) for who, function in named if who is not None]

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        name = recipe.algorithm.name
        if recipe.sampling.backprop_steps is None:
            raise ValueError(
                f"algorithm.name is {name!r} and sampling.backprop_steps is not given: give the number of last steps that "
                "the reward's gradient passes through, or the fewest and the most of them"
            )
        least, most = recipe.sampling.backprop_range
        if most > recipe.sampling.num_steps:
            given = most if least == most else [least, most]
            raise ValueError(
                f"sampling.backprop_steps is {given} and sampling.num_steps "
                f"{recipe.sampling.num_steps}: give a number of last steps, or the fewest and the most of them, at most "
                "num_steps"
            )
        if recipe.sampling.kl_reward:
            raise ValueError(
                f"sampling.kl_reward is {recipe.sampling.kl_reward:g} and algorithm.name {name!r}, whose loss has the "
                "gradient of the rewards alone: the KL would be measured and change nothing; leave kl_reward out"
            )
        _refuse_other_sums(recipe, name)
        if shards_weights(recipe.learner):
            raise ValueError(
                f"algorithm.name is {name!r} and learner.shard_weights true: ranks that take different numbers of steps "
                "would wait for each other's weights; give shard_optimizer_state"
            )
        if policy.cuda_graphs is True:
            raise ValueError(
                f"algorithm.name is {name!r} and policy.cuda_graphs true: a recorded network keeps the activations of one "
                'call, and the last steps are several; give "auto", which replays graphs in samplers alone'
            )

        self._check_kl(policy)

    def _check_kl(self, policy: PolicyConfig) -> None:
        if self.kl_coef and policy.train == "full":
            raise ValueError(
                f"algorithm.kl_coef is {self.kl_coef:g} and policy.train 'full': the pretrained model is the network with "
                'its adapters switched off; give policy.train = "lora", or kl_coef = 0'
            )

    def with_rewards(self, recipe: Recipe, rewards: Mapping[str, HasGradient], prompts: Sequence[Prompt]) -> Algorithm:
        copy = self.model_copy()
        copy._rewards = {each.called: (each.weight, rewards[each.called]) for each in recipe.all_rewards if each.weight}
        copy._prompts, copy._most_steps = tuple(prompts), recipe.sampling.backprop_range[1]
        return copy

    def learner_sizes(self, sizes: PolicySizes) -> PolicySizes:
        """Add the decoder and the weights of the rewards, whose activations are not counted."""
        weights = sizes.decoder_bytes + sum(reward.memory_bytes for _, reward in self._rewards.values())
        return with_restarts(sizes, self.most_passes, self.recompute, weights)

    @property
    def most_passes(self) -> int:
        """Return the most passes of the network that a restart takes: one a step."""
        return self._most_steps

    def passes_per_transition(self, recipe: Recipe) -> float:
        return sum(recipe.sampling.backprop_range) / 2

    def load(self, policy: Policy, config: PolicyConfig) -> Base:
        """Load the decoder and the rewards."""
        assert self._rewards, "`build_components` hands the rewards over"
        self.compared_steps(policy)
        config.load_decoder(policy)
        for name, (weight, reward) in self._rewards.items():
            own = not is_of_the_project(type(reward).__module__)
            load = functools.partial(call, reward, "load_differentiable") if own else reward.load_differentiable
            self._loaded[name] = (weight, load(policy.device))
        return super().load(policy, config) | config.loaded_base("decoder")

    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        """Return the rewards themselves, with which the learner compares those that it computes."""
        return statistics, np.asarray(rewards, dtype=np.float64)

    def gradient_may_be_zero(self, advantages: Float[np.ndarray, "N"]) -> bool:
        """Return True: a reward may be flat, or above a margin, for every image."""
        return True

    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch | RestartBatch) -> TransitionLoss:
        assert isinstance(batch, RestartBatch), "this algorithm trains on restarts"
        latents, shift = self.denoised(policy, batch)
        rewards = self.rewards_of(policy, latents, batch)
        terms = {REWARD_TERM: self.loss_scale * self.loss_of(rewards)}
        if shift is not None:
            terms["kl"] = self.kl_coef * shift
        detached = None if shift is None else shift.detach()
        return TransitionLoss(sum_of(terms), terms=terms, reward=rewards.detach(), prediction_shift=detached)

    def compared_steps(self, policy: Policy) -> DenoisingSteps | None:
        """Return the policy's schedule if predictions are compared with the pretrained model's, else None.

        Raises:
            ValueError: the policy does not tell its noise levels, or has no adapters to switch off.
        """
        if not self.kl_coef:
            return None
        if not adapted_layers(policy.network):
            raise ValueError(
                f"algorithm.kl_coef is {self.kl_coef:g}, and the network of {type(policy).__name__} has no LoRA adapters: "
                "the pretrained model is the network with its adapters switched off; give kl_coef = 0"
            )
        return steps_of(policy, f"algorithm.kl_coef is {self.kl_coef:g}")

    def denoised(
        self, policy: Policy, batch: RestartBatch
    ) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B"] | None]:
        """Return the latents whose images are scored, by default those after the last step, with gradients.

        The second result is the mean difference from the pretrained model's predictions, if `kl_coef` is above 0.
        """
        return denoised(policy, batch, self.recompute, self.compared_steps(policy))

    def rewards_of(self, policy: Policy, latents: Float[Tensor, "B C *S"], batch: RestartBatch) -> Float[Tensor, "B"]:
        """Decode latents and return the weighted sum of the rewards."""
        pixels = recomputed(policy.decode_pixels, latents) if self.recompute else policy.decode_pixels(latents)
        return weighted_sum(self._loaded, pixels, batch.prompts, batch.metadata)

    @abstractmethod
    def loss_of(self, rewards: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return the loss of each image."""


def _refuse_other_sums(recipe: Recipe, name: str) -> None:
    """Raise ValueError if the learning signal is another than the weighted sum of the rewards."""
    given = [f"aggregation.kind = {recipe.aggregation.kind!r}"] if recipe.aggregation.kind != "sum" else []
    given += [
        f"the floor {table.floor:g} of the reward {table.called!r}"
        for table in recipe.all_rewards
        if table.floor is not None
    ]
    if given:
        raise ValueError(
            f"algorithm.name is {name!r}, whose gradient is that of a weighted sum of rewards: leave out "
            f"{' and '.join(given)}"
        )

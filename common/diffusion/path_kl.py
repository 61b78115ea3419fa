"""PathKL: the KL of sampled trajectories to the pretrained model, which a recipe may subtract from the reward."""

from collections.abc import Collection
from typing import final

import torch
from torch import Tensor

from ray_ddpo.common.diffusion.deterministic_steps import Step
from ray_ddpo.common.diffusion.lora.adapters import adapted_layers, reference_policy
from ray_ddpo.common.diffusion.policy import Conditioning, Policy
from ray_ddpo.common.diffusion.transition import Transition


@final
class PathKL:
    """The KL of each image's trajectory: the sum over its stochastic steps, each from the means of both policies.

    The KL of a step is exact, so that the sum is an unbiased estimate of the KL between whole trajectories, with less
    noise than a difference of log-probs.
    """

    def __init__(self, policy: Policy) -> None:
        self._network = policy.network
        self._nats: list[Tensor] = []

    def watched(self, take: Step, actions: Collection[int]) -> Step:
        """Return a function that takes the same steps, and adds those of `actions`.

        `take` is called again for them, with the adapters switched off.
        """

        def take_and_add(latents: Tensor, step: int, rows: Conditioning) -> Transition:
            taken = take(latents, step, rows)
            if step in actions:
                with reference_policy(self._network):
                    self._nats.append(taken.kl_nats(take(latents, step, rows)))
            return taken

        return take_and_add

    def nats(self) -> tuple[float, ...]:
        """Return the KL of each image in nats."""
        return tuple(torch.stack(self._nats).double().sum(0).tolist())


def refuse_without_adapters(policy: Policy) -> None:
    """Raise ValueError if the policy's network has no adapters to switch off, so that its KL would be 0."""
    if not adapted_layers(policy.network):
        raise ValueError(
            f"sampling.kl_reward is above 0, and the network of {type(policy).__name__} has no LoRA adapters: the "
            "pretrained model is the network with its adapters switched off; leave kl_reward out"
        )

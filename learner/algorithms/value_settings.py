"""Settings of a value function that the learner learns from rewards: the keys of `[algorithm.value]`."""

from pydantic import Field

from ray_ddpo.common.recipe.registry import Component


class ValueSettings(Component):
    """A value function of latents, step and prompt, subtracted from advantages (DPOK, arXiv 2305.16381).

    Defaults are those of the authors' code, whose five batches of a round are accumulated into one step.
    """

    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate of AdamW for the value function."""
    steps: int = Field(default=5, ge=1)
    """AdamW steps of the value function in each round, before the policy's."""
    batch_size: int = Field(default=256, ge=1)
    """Transitions of such a step."""

"""Try the prompt source before anything starts. Other components are tried on its prompts."""

from typing import Any

import numpy as np

from ray_ddpo.actors.evaluation.eval_set import build_eval_set
from ray_ddpo.common.prompts import PROMPTS, Prompt, PromptFunction
from ray_ddpo.common.runtime import undisturbed
from ray_ddpo.common.user_code.blame import blamed, call, is_users_own
from ray_ddpo.deploy.driver.components import Components

TRIED = 2
MOST_CHECKED = 100_000  # prompts, which take seconds
_TRIAL = 11  # hashed with the run's seed, so that these prompts are independent of the rounds' prompts


def trial_prompts(components: Components) -> tuple[Prompt, ...]:
    """Sample two prompts. They belong to no round and change no round's prompts.

    Raises:
        ValueError: the source raises, or returns a value that is not a prompt.
    """
    source, name = components.prompts, f"{type(components.prompts).__name__}.load"
    generator = np.random.default_rng([components.recipe.seed, _TRIAL])
    with undisturbed():
        sample = call(source, "load") if is_users_own(source, PROMPTS) else source.load()
        if not callable(sample):
            raise ValueError(f"{name} returned {type(sample).__name__}: expected a function that samples a prompt")
        with blamed(source.path if isinstance(source, PromptFunction) else f"what {name} returned"):
            sampled: list[Any] = [sample(generator) for _ in range(TRIED)]
    for prompt in sampled:
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            raise ValueError(f"what {name} returned sampled {prompt!r}: expected a ray_ddpo.Prompt with a text")
    return tuple(sampled)


def checked_prompts(components: Components) -> list[str]:
    """Return the prompts of run and evaluation, to check which are longer than the text encoders read.

    If a function samples the prompts, the trial prompts represent the run's.
    """
    listed = components.prompts.listed()
    own = [prompt.text for prompt in trial_prompts(components)] if listed is None else listed
    evaluated = [prompt.text for prompt in build_eval_set(components.recipe.evaluation, components.prompts).prompts]
    return list(dict.fromkeys([*own, *evaluated]))[:MOST_CHECKED]

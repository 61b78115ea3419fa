"""Try the prompt source before anything starts: prompts as the run will have, which other components are tried on."""

from typing import Any

import numpy as np

from ray_ddpo.actors.evaluation.evaluation import evaluation_set
from ray_ddpo.common.prompts import PROMPTS, Prompt, PromptFunction
from ray_ddpo.common.runtime import undisturbed
from ray_ddpo.common.user_code.blame import blamed, call, is_users_own
from ray_ddpo.deploy.driver.components import Components

TRIED = 2
MOST_CHECKED = 100_000  # prompts, which take seconds
_TRIAL = 11  # what the run's seed is hashed with, beside the prompts of its rounds


def trial_prompts(parts: Components) -> tuple[Prompt, ...]:
    """Return two prompts. They are no round's, so that no round's change.

    Raises:
        ValueError: the source raises, or samples something else than a prompt.
    """
    source, name = parts.prompts, f"{type(parts.prompts).__name__}.load"
    generator = np.random.default_rng([parts.recipe.seed, _TRIAL])
    with undisturbed():
        sample = call(source, "load") if is_users_own(source, PROMPTS) else source.load()
        if not callable(sample):
            raise ValueError(f"{name} returned {type(sample).__name__}: expected a function that samples a prompt")
        with blamed(source.path if isinstance(source, PromptFunction) else f"what {name} returned"):
            sampled: list[Any] = [sample(generator) for _ in range(TRIED)]
    for prompt in sampled:
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            raise ValueError(f"what {name} returned sampled {prompt!r}: expected a common.prompts.Prompt with a text")
    return tuple(sampled)


def checked_prompts(parts: Components) -> list[str]:
    """Return the run's prompts and its evaluation's, to be told which are longer than the text encoders read.

    Where only a function samples prompts, those of the trial stand for the run's.
    """
    listed = parts.prompts.listed()
    own = [prompt.text for prompt in trial_prompts(parts)] if listed is None else listed
    evaluated = [prompt.text for prompt in evaluation_set(parts.recipe.evaluation, parts.prompts).prompts]
    return list(dict.fromkeys([*own, *evaluated]))[:MOST_CHECKED]

"""Try the prompt source before anything starts: prompts as the run will have, which other components are tried on."""

from typing import Any

import numpy as np

from ray_ddpo.actors.evaluation.evaluation import evaluation_set
from ray_ddpo.common.prompts import PROMPTS, Function, Prompt
from ray_ddpo.common.undisturbed import undisturbed
from ray_ddpo.common.user_code.blame import blamed, call, is_users_own
from ray_ddpo.deploy.driver.components import Parts

TRIED = 2
MOST_CHECKED = 100_000  # prompts, which take seconds
_TRIAL = 11  # what the run's seed is hashed with, beside the prompts of its rounds


def trial_prompts(parts: Parts) -> tuple[Prompt, ...]:
    """Return two prompts. They are no round's, so that no round's change.

    Raises:
        ValueError: the source raises, or draws something else than a prompt.
    """
    source, name = parts.prompts, f"{type(parts.prompts).__name__}.load"
    generator = np.random.default_rng([parts.recipe.seed, _TRIAL])
    with undisturbed():
        draw = call(source, "load") if is_users_own(source, PROMPTS) else source.load()
        if not callable(draw):
            raise ValueError(f"{name} returned {type(draw).__name__}: expected a function that draws a prompt")
        with blamed(source.path if isinstance(source, Function) else f"what {name} returned"):
            drawn: list[Any] = [draw(generator) for _ in range(TRIED)]
    for prompt in drawn:
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            raise ValueError(f"what {name} returned drew {prompt!r}: expected a common.prompts.Prompt with a text")
    return tuple(drawn)


def checked_prompts(parts: Parts) -> list[str]:
    """Return the run's prompts and its evaluation's, to be told which are longer than the text encoders read.

    Where only a function draws prompts, those of the trial stand for the run's.
    """
    listed = parts.prompts.listed()
    own = [prompt.text for prompt in trial_prompts(parts)] if listed is None else listed
    evaluated = [prompt.text for prompt in evaluation_set(parts.recipe.evaluation, parts.prompts).prompts]
    return list(dict.fromkeys([*own, *evaluated]))[:MOST_CHECKED]

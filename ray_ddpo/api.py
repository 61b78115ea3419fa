"""`train` for scripts and notebooks: a recipe, and Python objects in the place of some of its tables."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trackers.tracker import Metrics, Tracker
from ray_ddpo.deploy.driver.cluster import stopping_what_it_started
from ray_ddpo.handed_over import PromptsArgument, RewardArgument, components_given, stored_rows, with_components
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.run import Run
from ray_ddpo.train import run_training

# The command line's words in an error, and what a Python program writes instead.
IN_PYTHON = (
    (re.compile(r"--resume auto"), "resume=True"),
    (re.compile(r"--serial\b"), "serial=True"),
    (re.compile(r"--from (\S+?)(@\w+)?(?=[,;:)\s]|$)"), r'start_from={"run": "\1"} in Recipe.load'),
    (re.compile(r"(?<!\S)--([a-z_]+(\.[a-z_0-9]+)*)"), r"\1"),
)


def train(
    recipe: Recipe | str | os.PathLike[str],
    *,
    reward: RewardArgument | Mapping[str, RewardArgument] | None = None,
    prompts: PromptsArgument | None = None,
    pipeline: Any = None,
    policy: PolicyConfig | None = None,
    algorithm: Algorithm | None = None,
    trackers: Iterable[Tracker] = (),
    on_round: Callable[[Metrics], object] | None = None,
    serial: bool = False,
    resume: bool = False,
) -> Run:
    """Train a recipe. Each argument but the first replaces a table of it.

    A function or class that other processes can import is imported there. Any other (a lambda, a closure, a definition of
    the script or notebook itself) travels to Ray's processes by value.

    Args:
        recipe: a recipe, the path of its file, or the name of one that ships with the package (`"demo"`).
        reward: a function `(images, prompts, metadata) -> scores` with uint8 images [B, H, W, 3] and one number an image, a
            `Reward`, or a dictionary of several by name, which are added up.
        prompts: a list of texts, a function `(generator) -> text` or `-> (text, metadata)`, or a `PromptSource`; for
            editing a list of rows with `prompt`, `image` and, for inpainting, `mask`: paths, PIL images or arrays.
        pipeline: a pipeline of diffusers, which is saved in the run's folder, or the folder of one.
        policy: the configuration of a model family, in the place of `[policy]`.
        algorithm: an algorithm, in the place of `[algorithm]`.
        trackers: trackers beside those of the recipe.
        on_round: called with each round's metrics. An error of it is printed, and the run continues without it.
        serial: train in this process, without Ray.
        resume: continue the run in the recipe's folder, if there is one.

    Raises:
        ValueError: something that the caller has to change.
        Stopped: a signal came, or the storage or the cluster failed. The last checkpoint has what was learned.
    """
    with _errors_in_python():
        replaced = {"policy": policy, "algorithm": algorithm, "trackers": trackers, "on_round": on_round}
        chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        given = components_given(reward=reward, prompts=stored_rows(prompts, chosen), **replaced)
        chosen = with_components(chosen, given, pipeline)
        place = chosen.run_path() if "://" in chosen.output_dir else Path(chosen.run_path()).absolute()
        with stopping_what_it_started():
            run_training(chosen, resume=resume, serial=serial, given=given)
    return Run(place, given)


@contextmanager
def _errors_in_python() -> Iterator[None]:
    """Turn the command line's words in a ValueError into arguments of `train`. An actor's error becomes its cause."""
    try:
        yield
    except ValueError as error:
        text = str(getattr(error, "cause", error))
        for pattern, words in IN_PYTHON:
            text = pattern.sub(words, text)
        raise ValueError(text) from error

"""Load the parts of a role so that any error is one line for the user, the same on Ray and in one process."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_ddpo.common.model_files.model_hub import Weights, damaged_files, first_line
from ray_ddpo.common.user_code.frames import is_projects, place_in_users_code

OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")  # Python's and torch's


class PartNotLoaded(ValueError):
    """A model or a reward cannot be loaded. The text names the part, the cause and the place in the user's code."""


class RoleNotStarted(ValueError):
    """A sampler, reward worker, scorer or learner cannot start. The text is one line for the user."""


@contextmanager
def loading(part: str, needs: Callable[[], tuple[Weights, ...]] = tuple) -> Iterator[None]:
    """Load one part of a role in the body.

    Args:
        part: the part in words, with the recipe's key and value, as an error names it.
        needs: returns the files that the part reads. Damaged files are named in the error.

    Raises:
        PartNotLoaded: The body raised an error. A ValueError of the project's own code passes unchanged.
    """
    try:
        yield
    # Anything that a model or a user's module raises while loading is for the user to fix, so it becomes one line.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        damaged = [fault for weights in needs() for fault in damaged_files(weights)]
        if damaged:
            raise ValueError(f"{part}, and {damaged[0]}: copy or download that file again") from error
        if is_for_the_user(error):
            raise
        raise PartNotLoaded(f"{part}, which cannot be loaded: {in_words(error)}") from error


@contextmanager
def starting(role: str) -> Iterator[None]:
    """Construct a role in the body.

    Args:
        role: the role's name in words.

    Raises:
        RoleNotStarted: The body raised an error. The text is the same in whatever process the role runs.
    """
    try:
        yield
    # A constructor loads the user's inputs: its error ends the run with one line, and a retry would not help.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RoleNotStarted(str(error) if is_for_the_user(error) else f"{role}: {in_words(error)}") from error


def is_for_the_user(error: BaseException) -> bool:
    """Return whether an error was written for the user: a ValueError that the project's own code raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and is_projects(frames[-1].filename)
    return isinstance(error, ValueError) and ours and not isinstance(error, PartNotLoaded)


def in_words(error: BaseException) -> str:
    """Describe an error in one line: its type, its first line, and where in the user's code it was raised."""
    if isinstance(error, PartNotLoaded):
        return str(error)
    said = first_line(error)
    words = f"{type(error).__name__}: {said}" if said else type(error).__name__
    place = place_in_users_code(error)
    advice = "; ddpo plan shows what each role needs" if type(error).__name__ in OUT_OF_MEMORY else ""
    return f"{words}{f' ({place})' if place else ''}{advice}"

"""Load the parts of a role so that any error is one line for the user, the same on Ray and in one process."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_ddpo.common.model_files.model_hub import Weights, damaged_files, first_line
from ray_ddpo.common.user_code.blame import converting_errors
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

    # Anything that a model or a user's module raises while loading is for the user to fix, so it becomes one line.
    def converted(error: BaseException) -> BaseException:
        damaged = [fault for weights in needs() for fault in damaged_files(weights)]
        if damaged:
            return ValueError(f"{part}, and {damaged[0]}: copy or download that file again")
        return error if is_for_the_user(error) else PartNotLoaded(f"{part}, which cannot be loaded: {in_words(error)}")

    with converting_errors(converted):
        yield


@contextmanager
def starting(role: str) -> Iterator[None]:
    """Construct a role in the body.

    Args:
        role: the role's name in words.

    Raises:
        RoleNotStarted: The body raised an error. The text is the same in whatever process the role runs.
    """

    # A constructor loads the user's inputs: its error ends the run with one line, and a retry would not help.
    def converted(error: BaseException) -> RoleNotStarted:
        return RoleNotStarted(str(error) if is_for_the_user(error) else f"{role}: {in_words(error)}")

    with converting_errors(converted):
        yield


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

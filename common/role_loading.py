"""Load the parts of a role so that whatever goes wrong is one line for the user, the same on Ray and in one process."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_ddpo.common.model_files.model_hub import Weights, damaged_files, first_line
from ray_ddpo.common.user_code.frames import is_projects, place_in_users_code

OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")  # the second is torch's


class PartNotLoaded(ValueError):
    """A model or a reward cannot be loaded. The text names the part, the cause and the place in the user's code."""


class RoleNotStarted(ValueError):
    """A sampler, reward worker, scorer or learner cannot start. The text is one line for the user."""


@contextmanager
def loading(part: str, needs: Callable[[], tuple[Weights, ...]] = tuple) -> Iterator[None]:
    """Load one part of a role in the body.

    Args:
        part: the part in words, with the recipe's key and value, as an error names it.
        needs: what the part reads. A damaged file among it is named.

    Raises:
        PartNotLoaded: the body raised an error. A ValueError of the project's own code says it all, and passes.
    """
    try:
        yield
    # Whatever a model or a user's module raises while it loads is the user's to mend, so all of it becomes one line.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        damaged = [fault for weights in needs() for fault in damaged_files(weights)]
        if damaged:
            raise ValueError(f"{part}, and {damaged[0]}: copy or download that file again") from error
        if says_it_all(error):
            raise
        raise PartNotLoaded(f"{part}, which cannot be loaded: {in_words(error)}") from error


@contextmanager
def starting(role: str) -> Iterator[None]:
    """Construct a role in the body; `role` is its name in words.

    Raises:
        RoleNotStarted: the body raised an error. Its text is the same in whatever process the role runs.
    """
    try:
        yield
    # A constructor loads what the user gave: an error of it ends the run in one line, and no other attempt would help.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RoleNotStarted(str(error) if says_it_all(error) else f"{role}: {in_words(error)}") from error


def says_it_all(error: BaseException) -> bool:
    """Return whether an error was written for the user: a ValueError that the project's own code raises."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and is_projects(frames[-1].filename)
    return isinstance(error, ValueError) and ours and not isinstance(error, PartNotLoaded)


def in_words(error: BaseException) -> str:
    """Return an error's kind, its first line, and where in the user's code it was raised, in one line."""
    if isinstance(error, PartNotLoaded):
        return str(error)
    said = first_line(error)
    words = f"{type(error).__name__}: {said}" if said else type(error).__name__
    place = place_in_users_code(error)
    advice = "; ddpo plan shows what each role needs" if type(error).__name__ in OUT_OF_MEMORY else ""
    return f"{words}{f' ({place})' if place else ''}{advice}"

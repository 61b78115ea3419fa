"""Run the doctor's checks one by one. An exception becomes a fault that names check, cause and the user's line."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ray_ddpo.common.model_files.model_hub import first_line
from ray_ddpo.common.user_code.blame import converting_errors
from ray_ddpo.common.user_code.frames import place_in_users_code
from ray_ddpo.common.user_code.sources import is_of_the_project

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report, with advice if the user should act."""

    level: Level
    subject: str
    found: str
    advice: str = ""


class OutOfTime(Exception):
    """Error of a check that got no resources on the cluster, or did not end in time."""


class CheckFailed(Exception):
    """Any other error of a check, in one line."""


def guarded(subject: str, check: Callable[..., Iterable[Any]], *arguments: Any) -> Iterator[Any]:
    """Yield the findings of a check. An exception other than OutOfTime becomes a fault."""
    try:
        # A check loads user code and possibly damaged files, which may raise any exception. Reporting it is the task.
        with converting_errors(lambda error: error if isinstance(error, OutOfTime) else CheckFailed(described(error))):
            yield from check(*arguments)
    except CheckFailed as failed:
        yield Finding("fault", subject, str(failed))


def described(error: BaseException) -> str:
    """Return an error in one line, with the line of user code that it comes from."""
    cause = getattr(error, "cause", None) or error  # Ray wraps exceptions of other processes
    said = first_line(cause)
    place = place_in_users_code(cause)
    ours = type(cause) is ValueError or is_of_the_project(
        type(cause).__module__
    )  # our own messages need no exception name
    kind = "" if ours and said else type(cause).__name__
    return ": ".join(part for part in (kind, said) if part) + (f" ({place})" if place and place not in said else "")

"""Run the doctor's checks one by one: whatever a check raises becomes a fault that names check, cause and the user's line."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ray_ddpo.common.model_files.model_hub import first_line
from ray_ddpo.common.user_code.frames import place_in_users_code
from ray_ddpo.common.user_code.sources import is_of_the_project

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` is there where something is to be done."""

    level: Level
    subject: str
    found: str
    advice: str = ""


class OutOfTime(Exception):
    """A check had no place on the cluster, or did not end in time."""


def guarded(subject: str, check: Callable[..., Iterable[Any]], *arguments: Any) -> Iterator[Any]:
    """Yield what a check finds. What it raises becomes a fault, but for OutOfTime."""
    try:
        yield from check(*arguments)
    except OutOfTime:
        raise
    # A check loads a user's own code and files that may be damaged, and both raise anything: to find that is the task.
    except BaseException as error:  # noqa: BLE001
        if isinstance(error, KeyboardInterrupt):
            raise
        yield Finding("fault", subject, described(error))


def described(error: BaseException) -> str:
    """Return what an error says in one line, with the line of a user's own code that it comes from."""
    cause = getattr(error, "cause", None) or error  # Ray wraps what was raised elsewhere
    said = first_line(cause)
    place = place_in_users_code(cause)
    ours = type(cause) is ValueError or is_of_the_project(type(cause).__module__)  # it says it all
    kind = "" if ours and said else type(cause).__name__
    return ": ".join(part for part in (kind, said) if part) + (f" ({place})" if place and place not in said else "")

"""Describe the error of a reward: the error itself, the user's file and line, and the reward's frames."""

import traceback
from pathlib import Path
from types import TracebackType

from ray_ddpo.actors.rewards import contract
from ray_ddpo.common.user_code.frames import is_projects, users_frame

LONGEST = 500  # characters of an error's text
# After one of these errors, every later call to the device fails in this process.
POISONED = ("CUDA error", "device-side assert", "HIP error")


class ScoringFailed(ValueError):
    """A reward raised an error for a batch of images. A retry, or fewer images, may succeed."""

    def __init__(self, reason: str, trace: str = "", poisoned: bool = False) -> None:
        """Describe the error.

        Args:
            reason: one line with the reward, the error, and the user's file and line.
            trace: the reward's frames, for a person to read.
            poisoned: the process cannot compute any more.
        """
        super().__init__(reason, trace, poisoned)
        self.reason, self.trace, self.poisoned = reason, trace, poisoned

    def __str__(self) -> str:
        return self.reason


def scoring_failed(name: str, error: BaseException) -> ScoringFailed:
    """Convert an error that the reward `name` raised."""
    frames = _frames(error.__traceback__)
    own = users_frame(frames) or (frames[0] if frames else None)  # else the first frame of the reward
    text = " ".join(str(error).split())[:LONGEST]
    says = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = f" at {own.filename}:{own.lineno}, in {own.name}" if own else ""
    if isinstance(error, ValueError) and own and is_projects(own.filename):  # our errors are complete
        return ScoringFailed(f"the reward {name!r} raised {says}")
    if isinstance(error, ValueError) and "read-only" in text:
        says += " (images are read-only, because every reward is given the same ones: change a copy, images.copy())"
    trace = "".join([*traceback.format_list(frames), *traceback.format_exception_only(error)]).rstrip()
    return ScoringFailed(f"the reward {name!r} raised {says}{place}", trace, is_poisoned(error))


def is_poisoned(error: BaseException) -> bool:
    """Return whether an error leaves the process's device unusable, as an assertion on a GPU does."""
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in POISONED)


def _frames(trace: TracebackType | None) -> list[traceback.FrameSummary]:
    """Return the frames below the call of the reward."""
    frames = list(traceback.extract_tb(trace))
    calls = [number for number, frame in enumerate(frames) if Path(frame.filename) == Path(contract.__file__)]
    return frames[calls[-1] + 1 :] if calls and calls[-1] + 1 < len(frames) else frames

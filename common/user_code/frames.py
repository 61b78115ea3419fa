"""Tell a user's own code from the project's, Python's and installed libraries', to name the line at fault (no torch)."""

import re
import traceback
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parents[2]  # ray_ddpo/, which in a clone has links to the four folders beside it
FOLDERS = (PACKAGE, *((PACKAGE / name).resolve() for name in ("common", "actors", "learner", "deploy")))
OURS = tuple(f"{folder}/" for folder in FOLDERS)
LIBRARIES = re.compile(r"/(site|dist)-packages/|/lib(64)?/python\d")  # Python's own too, on whichever machine


def is_projects(file: str) -> bool:
    """Return whether a source file is part of this program."""
    return file.startswith(OURS)


def is_users(file: str) -> bool:
    """Return whether a source file is the user's own: neither the project's nor Python's nor an installed library's."""
    path = str(Path(file).resolve())
    return not (file.startswith("<") or path.startswith(OURS) or LIBRARIES.search(file))


def users_frame(frames: Iterable[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """Return the innermost frame of the user's own code."""
    return next((frame for frame in reversed(list(frames)) if is_users(frame.filename)), None)


def place_in_users_code(error: BaseException | None) -> str | None:
    """Return "file:line" of the innermost call in the user's own code, of an error or of what caused it."""
    while error is not None:
        if isinstance(error, SyntaxError) and error.filename and is_users(error.filename):
            return f"{error.filename}:{error.lineno}"
        if frame := users_frame(traceback.extract_tb(error.__traceback__)):
            return f"{frame.filename}:{frame.lineno}"
        error = error.__cause__
    return None

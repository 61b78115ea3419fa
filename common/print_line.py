"""Print a line for the user in a single write, so that lines of several threads do not mix."""

import sys
from typing import TextIO


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print a line to a stream, by default to standard error.

    `print` writes text and newline separately. Another thread's line can stand between the two.
    """
    target = sys.stderr if stream is None else stream
    target.write(f"{text}\n")
    target.flush()

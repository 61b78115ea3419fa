"""Print a line for the user in a single write, so that lines of several threads do not mix."""

import sys


def print_line(text: str, to_stdout: bool = False) -> None:
    """Print a line to standard error, or to standard output.

    `print` writes text and newline separately. Another thread's line can stand between the two.
    """
    stream = sys.stdout if to_stdout else sys.stderr
    stream.write(f"{text}\n")
    stream.flush()

"""Compare what the program made of an input with the row of docs/what_it_accepts.md that documents the situation."""

import re
from pathlib import Path

from tests.failure_page import CELLS

PAGE = Path(__file__).parents[1] / "docs" / "what_it_accepts.md"
HEADINGS = ("situation", "---")


def documented_inputs() -> dict[str, str]:
    """Return the result of each situation on the page. A situation stands there once."""
    rows: dict[str, str] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in CELLS.split(line)[1:-1]]
        if len(cells) != 2 or cells[0] in HEADINGS:
            continue
        situation, result = cells
        assert situation not in rows, f"{PAGE.name} has two rows for {situation!r}"
        rows[situation] = result
    return rows


def assert_accepted(situation: str) -> None:
    """Check that the page says that this is taken; the test around shows that the result is right."""
    result = documented_inputs().get(situation)
    assert result, f"{PAGE.name} has no row for {situation!r}"
    assert not result.startswith("`"), f"the test accepts {situation!r}, documented is {result}"


def assert_refused(situation: str, printed: str) -> None:
    """Check what was printed, or the message of an exception, against the message of the page's row."""
    result = documented_inputs().get(situation)
    assert result, f"{PAGE.name} has no row for {situation!r}"
    assert result.startswith("`") and result.endswith("`"), f"{situation!r} was refused, documented is {result}"
    parts = [re.escape(" ".join(part.split())) for part in result.strip("`").split("…")]
    flat = " ".join(printed.split())
    assert re.search(".*?".join(parts), flat), f"documented is {result}, printed was:\n{printed[-3000:]}"
    assert "Traceback (most recent call last)" not in printed, printed[-6000:]

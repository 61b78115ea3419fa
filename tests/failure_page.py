"""Compare what a program printed with the row of docs/what_can_go_wrong.md that documents the situation."""

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "what_can_go_wrong.md"
CELLS = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class DocumentedFailure:
    """One row of the page: what happens, what is printed, how the program ends, and what helps."""

    situation: str
    message: str
    exit_code: int
    advice: str


def documented_failures() -> dict[str, DocumentedFailure]:
    """Return the page's rows by their situation. A situation stands there once."""
    rows: dict[str, DocumentedFailure] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in CELLS.split(line)[1:-1]]
        if len(cells) != 4 or not cells[2].isdigit():
            continue
        situation, message, exit_code, advice = cells
        assert situation not in rows, f"{PAGE.name} has two rows for {situation!r}"
        rows[situation] = DocumentedFailure(situation, message.strip("`"), int(exit_code), advice)
    return rows


def assert_documented(situation: str, exit_code: int, printed: str) -> None:
    """Check a program's exit code and output against the page, and that no traceback of ours or Ray's was printed.

    Args:
        situation: the first cell of the row, as written there.
        exit_code: the program's.
        printed: all of its output; whitespace and line breaks do not matter.
    """
    row = documented_failures().get(situation)
    assert row, f"{PAGE.name} has no row for {situation!r}"
    assert exit_code == row.exit_code, f"exit code {exit_code}, documented is {row.exit_code}:\n{printed[-3000:]}"
    parts = [re.escape(" ".join(part.split())) for part in row.message.split("…")]
    flat = " ".join(printed.split())
    assert re.search(".*?".join(parts), flat), f"documented is {row.message!r}, printed was:\n{printed[-3000:]}"
    assert "Traceback (most recent call last)" not in printed or "Traceback" in row.message, printed[-6000:]

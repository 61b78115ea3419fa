"""Every row of docs/what_it_accepts.md is compared with what the program does by some test."""

import ast
from pathlib import Path

import pytest

from tests.accepted_page import assert_accepted, assert_refused, documented_inputs

TESTS = Path(__file__).parent


def compared_situations() -> set[str]:
    """Return every text in a test file that uses the page: a superset of what is compared."""
    texts: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name == Path(__file__).name or not ("assert_accepted" in source or "assert_refused" in source):
            continue
        nodes = ast.walk(ast.parse(source))
        texts |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts


def test_every_documented_input_is_compared() -> None:
    missing = documented_inputs().keys() - compared_situations()
    assert not missing, f"no test compares these rows with what the program does: {sorted(missing)}"


def test_a_wrong_result_or_message_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("| situation | result |\n|---|---|\n| x | as diffusers |\n| y | `a.key is … : do b` |\n")
    monkeypatch.setattr("tests.accepted_page.PAGE", page)
    assert_accepted("x")
    assert_refused("y", "ddpo train: a.key is 7 :\n do b")
    for situation in ("y", "z"):
        with pytest.raises(AssertionError):
            assert_accepted(situation)
    for situation, printed in (("x", "a.key is 7 : do b"), ("y", "a.other is 7 : do b"), ("z", "a.key is 7 : do b")):
        with pytest.raises(AssertionError):
            assert_refused(situation, printed)

"""Every row of docs/what_can_go_wrong.md is compared with a real run by some test."""

import ast
from pathlib import Path

import pytest

from tests.failure_page import assert_documented, documented_failures

TESTS = Path(__file__).parent


def compared_situations() -> set[str]:
    """Return every text in a test file that calls `assert_documented`: a superset of what is compared."""
    texts: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name == Path(__file__).name or "assert_documented" not in source:
            continue
        nodes = ast.walk(ast.parse(source))
        texts |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts


def test_every_documented_failure_is_compared_with_a_run() -> None:
    missing = documented_failures().keys() - compared_situations()
    assert not missing, f"no test compares these rows with a run: {sorted(missing)}"


def test_a_wrong_exit_code_message_or_traceback_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "| situation | message | exit code | what to do |\n|---|---|---|---|\n| x | `a.key is … : do b` | 2 | b |\n"
    )
    monkeypatch.setattr("tests.failure_page.PAGE", page)
    assert_documented("x", 2, "ddpo train: a.key is 7 :\n do b")
    for situation, code, printed in (
        ("y", 2, "a.key is 7 : do b"),
        ("x", 1, "a.key is 7 : do b"),
        ("x", 2, "a.other is 7 : do b"),
        ("x", 2, "Traceback (most recent call last)\n a.key is 7 : do b"),
    ):
        with pytest.raises(AssertionError):
            assert_documented(situation, code, printed)

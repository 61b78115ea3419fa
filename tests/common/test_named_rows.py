"""Rows by name."""

from ray_ddpo.common.metrics.statistics import rows_by_name


def test_rows_stand_in_order_under_their_name() -> None:
    found = rows_by_name(["cat", "dog", "cat", "emu"])
    assert {name: rows.tolist() for name, rows in found.items()} == {"cat": [0, 2], "dog": [1], "emu": [3]}
    assert list(found) == ["cat", "dog", "emu"]

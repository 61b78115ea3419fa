"""The benchmark of rounding: equal numerics give equal bits, another dtype does not."""

from pathlib import Path

import pytest

from benchmarks.rounding import measured


@pytest.mark.thorough
def test_equal_numerics_give_equal_log_probs_on_any_processor(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert found["alike"] == 0.0
    assert isinstance(found["apart"], float) and found["apart"] > 0.0

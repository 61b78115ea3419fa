"""The benchmark of rounding: computed alike, bits are equal; computed in another dtype, they are not."""

from pathlib import Path

import pytest

from benchmarks.rounding import measured


@pytest.mark.thorough
def test_like_compared_with_like_is_exact_whatever_the_processor(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert found["alike"] == 0.0
    assert isinstance(found["apart"], float) and found["apart"] > 0.0

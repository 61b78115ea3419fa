"""A tiny video run that learns: held-out clips move faster."""

from pathlib import Path

import pytest

from benchmarks.video_motion import trained


@pytest.mark.thorough
def test_clips_move_faster_after_a_run_for_motion(tmp_path: Path) -> None:
    run = trained(0, tmp_path)
    assert run.after > run.before and run.errors > 3

"""The memory table without a GPU: the counted bytes of a tiny model's work agree with the plan."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.thorough
def test_planned_batches_run_and_take_the_predicted_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_memory", "--tiny", "--device", "cpu", "--dtype", "float32"]
    subprocess.run([*command, "--threads", "1", "--out", str(tmp_path)], check=True, timeout=300)
    with (tmp_path / "gpu_memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["role"] for row in rows} == {"learner", "learner, checkpointing", "sampler"}
    assert len(rows) == 6
    for row in rows:
        assert int(row["largest_batch"]) >= min(int(row["planned_batch"]), 31) > 0
        assert float(row["predicted_gb"]) == pytest.approx(float(row["allocated_gb"]), rel=0.1)
        assert float(row["allocated_gb"]) <= float(row["gigabytes"]) * 2**30 / 1e9
    assert (tmp_path / "gpu_memory.md").read_text().count("\n") == 2 + len(rows)

"""The GPU benchmark: its tables by hand, and a complete run on a CPU where Ray cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import LONG, OURS, _parser, section_names
from benchmarks.gpu_tables import PUBLISHED, markdown

ROOT = Path(__file__).parents[2]
DEVICE = {"flops": 1e12, "copied": 2e9, "forward_flops": 1e9, "both_flops": 3e9, "machine": "a day, a commit, a GPU"}


def round_of(sampling: float, learning: float, images: int, bare: dict[str, float]) -> dict:
    seconds = {"sampling": sampling, "scoring": 0.0, "learning": learning, "round": sampling + learning}
    times = {**seconds, "peak_bytes": 2e9}
    return {"steps": 50, "images": images, "first": {"round": 7.0}, "round": times, "bare": bare}


def test_help_names_sections_and_defaults() -> None:
    text = _parser().format_help()
    plain, named = text.split("sections that run only if --only names them:")
    assert all(f"  {name}\n" in f"{named}\n" and f"  {name}\n" not in plain for name in LONG)
    assert all(f"  {name}\n" in plain for name in section_names() if name not in LONG)
    assert "(default: 340.0)" in text and "runs/gpu)" in text


def test_costs_shares_and_ratios_by_hand(tmp_path: Path) -> None:
    found = {
        "device": DEVICE,
        "ours": round_of(8.0, 12.0, 16, {"sampling": 7.2, "learning": 9.0}),
        "TRL, its example's batches": round_of(6.0, 12.0, 6, {}),
    }
    lines = [json.dumps({"section": section, "found": values}) for section, values in found.items()]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    network = [
        {"variant": "ours", "passes": "forward", "rows": 4, "seconds": 0.02, "first": 1.0, "peak": 1e9},
        {"bits": "CUDA graph of 4 rows and eager", "equal": True},
        {"variant": "CUDA graph", "passes": "forward", "rows": 4, "seconds": 0.016, "first": 1.0, "peak": 1e9},
        {"variant": "ours", "passes": "forward and backward", "rows": 2, "seconds": 0.012, "first": 1.0, "peak": 1e9},
        {"variant": "CUDNN", "failed": "no kernel"},
    ]
    (tmp_path / "network.jsonl").write_text("\n".join(map(json.dumps, network)))
    page = markdown(tmp_path)
    # 100 rows an image at 1e9 operations in half a second are 0.2 TFLOP/s of 1; 3e9 in 0.75 s are 0.4.
    assert "| ours | 0.500 | 0.750 | 1.250 | 7 s | 2.0 | 20%, 40% | 0.90, 0.75 |" in page
    assert "| TRL, its example's batches | 1.000 | 2.000 | 3.000 | 7 s | 2.0 | 10%, 15% | – |" in page
    assert "against TRL, its example's batches: sampling 2.00 ×, learning 2.67 ×, round 2.40 ×" in page
    assert f"0.80 images/s a GPU, 1.25 GPU-seconds an image, where {PUBLISHED} A100-seconds" in page
    # 1e9 operations of a row in 4 ms are 0.25 TFLOP/s of 1, and 3e9 in 6 ms are 0.5.
    assert "| forward | 4 | CUDA graph | 4.00 | 0.2 | 25% | 1.25 × | 1.0 s | 1.0 |" in page
    assert "| forward and backward | 2 | ours | 6.00 | 0.5 | 50% | 1.00 × | 1.0 s | 1.0 |" in page
    assert "bits, CUDA graph of 4 rows and eager: {'equal': True}" in page
    assert "CUDNN failed: no kernel" in page
    assert "at the matrix rate 1.00 and 3.00 ms" in page


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_every_section_but_trls_runs_on_a_cpu_without_ray(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")
    # Compiling every network would take many minutes: the calls go the same way without it.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    sections = ["device", "network", *OURS, "blocks compiled", "noise", "memory", "waits"]
    command = ["-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--output", str(tmp_path / "found")]
    done = subprocess.run(
        [sys.executable, *command, "--only", *sections],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # A CPU lacks some backends of attention. That must end neither the section nor the others.
    failed = [line for line in done.stdout.splitlines() if "failed" in line and "ATTENTION attention" not in line]
    assert not failed, failed
    for row in (
        "| ours, compiled |",
        "| ours, compiled, not deterministic |",
        "| forward and backward | 2 | adapters learner's, contiguous, deterministic |",
        "| forward | 4 | blocks compiled |",
        "bits, gradients on and off: {'equal': True}",
        "| both compiled | learner's micro-batches",
    ):
        assert row in done.stdout, done.stdout
    assert "0 waits in a round of 8 micro-batches" in done.stdout
    assert "learner" in (tmp_path / "found/gpu_memory.md").read_text()

"""The benchmark of other families runs in its small form, and its random pipelines load and sample."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_families import save_random_family
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.tiny_families import MAKERS, policy_table


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_a_round_of_each_family_is_measured_with_tiny_models(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_families",
        "--tiny",
        "--device",
        "cpu",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| sdxl", "| sd3"))]
    assert len(rows) == 2 and all("nan" not in row for row in rows)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_pipeline_of_random_weights_samples_images(family: str, tmp_path: Path) -> None:
    """Use the configuration files of a small model in place of the published ones."""
    keys = {"t5": False} if family == "sd3" else {}
    config: DiffusersConfig = build(
        POLICIES, policy_table(family, MAKERS[family](tmp_path / "small"), **keys), "policy"
    )
    model = save_random_family(tmp_path / "random", config)
    sampling = SamplingTable(num_steps=2)
    policy = build(POLICIES, policy_table(family, model, **keys), "policy").load("cpu", sampling, "sampler")
    trajectory = sample_trajectories(policy, ["a cat"], [1], sampling)
    assert trajectory.log_probs.isfinite().all()
    assert policy.decode(trajectory.final_latents).to(torch.float32).std() > 5

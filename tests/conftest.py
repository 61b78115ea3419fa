"""What all tests share: a tiny pipeline, a small recipe on it, and quiet libraries."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from common.config import Recipe  # noqa: E402
from tests.tiny_pipeline import save_tiny_pipeline  # noqa: E402

os.environ["RAY_AUTH_MODE"] = "token"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tables(tiny_model: Path, tmp_path: Path) -> dict:
    """A recipe on the tiny pipeline that runs in seconds: 2 rounds of 2 tasks of 4 images, 4 steps."""
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "runs"),
        "rounds": 2,
        "policy": {"name": "stable_diffusion", "model": str(tiny_model)},
        "prompts": {"name": "animals"},
        "sampling": {"num_steps": 4, "guidance_scale": 3.0, "batch_size": 4, "batches_per_round": 2},
        "reward": {"name": "jpeg_compressibility"},
        "algorithm": {"name": "ddpo_is", "clip_range": 1e-3},
        "learner": {"batch_size": 4, "micro_batch_size": 8, "learning_rate": 1e-3},
    }


@pytest.fixture
def recipe(tables: dict) -> Recipe:
    return Recipe.parse(tables)

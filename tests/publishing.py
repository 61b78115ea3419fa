"""Shared parts of the publishing tests: users of a hub, a run that asks to be published, and an environment."""

import os
from pathlib import Path

import tomli_w

from tests.hub_server import user

TOKEN = "hf_s3cretNeverToBeShown"
READS = "hf_readsAlone"
TOKENS = {TOKEN: user("alice", orgs={"zoo": "write", "museum": "read"}), READS: user("alice", role="read")}
EVALUATION = {"every": 1, "prompts": ["cat", "dog"], "images": 4, "batch_size": 4, "scorers": [{"name": "brightness"}]}


def recipe_file(folder: Path, model: Path, **changes: object) -> Path:
    """Write a recipe of two short rounds on the tiny pipeline, whose policy soon exceeds the guard's KL."""
    tables: dict = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "rounds": 2,
        "policy": {"name": "stable_diffusion", "model": str(model)},
        "prompts": {"name": "animals"},
        "sampling": {"num_steps": 4, "guidance_scale": 3.0, "batch_size": 4, "batches_per_round": 1},
        "reward": {"name": "jpeg_compressibility"},
        "algorithm": {"name": "ddpo_is", "clip_range": 1e-3},
        "learner": {"batch_size": 4, "micro_batch_size": 8, "learning_rate": 1e-3},
        "evaluation": EVALUATION,
        "guard": {"max_kl_nats": 1e-9},
        "push": {"repo": "alice/tiny", "license": "mit"},
        **changes,
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def with_the_hub(url: str) -> dict[str, str]:
    added = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **added, "OMP_NUM_THREADS": "1"}

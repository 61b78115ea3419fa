"""Save a run's state, find the newest whole checkpoint, and read it back: safetensors and JSON, nothing unpickled."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load, save

from common.lora_weights import LoraWeights, verified
from common.run_folder import write_atomically
from learner.advantages import PromptStatistics
from learner.learner import LearnerState

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on: rounds done, the learner, the advantage statistics."""

    rounds_done: int
    learner: LearnerState
    statistics: PromptStatistics


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/round-000012`; then forget all but the newest `keep`. A commit is its manifest, written last."""
    path = folder / f"round-{checkpoint.rounds_done:06d}"
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    files = _files(checkpoint)
    for name, data in files.items():
        write_atomically(path / name, data)
    manifest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_atomically(path / MANIFEST, json.dumps(manifest, indent=1).encode())
    write_atomically(folder / "latest", path.name.encode())
    for old in sorted(_committed(folder))[:-keep]:
        shutil.rmtree(old)
    return path


def _files(checkpoint: Checkpoint) -> dict[str, bytes]:
    learner = checkpoint.learner
    state = {
        "rounds_done": checkpoint.rounds_done,
        "policy_version": learner.policy_version,
        "weights": [_weights_header(weights) for weights in learner.weights],
        "scaler": learner.scaler,
        "statistics": checkpoint.statistics,
    }
    files = {
        f"weights-{weights.policy_version:06d}.safetensors": save({"buffer": weights.buffer})
        for weights in learner.weights
    }
    files["optimizer.safetensors"] = save(learner.optimizer)
    files["state.json"] = json.dumps(state).encode()
    return files


def _weights_header(weights: LoraWeights) -> dict[str, object]:
    return {"policy_version": weights.policy_version, "manifest": weights.manifest, "fingerprint": weights.fingerprint}


def _committed(folder: Path) -> list[Path]:
    return [path for path in folder.glob("round-*") if (path / MANIFEST).is_file()]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all what its manifest says; None where there is none."""
    return next((path for path in sorted(_committed(folder), reverse=True) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    manifest = json.loads((path / MANIFEST).read_text())
    return all(
        (path / name).is_file() and hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
        for name, digest in manifest.items()
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. ValueError: its weights are not what they were saved as."""
    state = json.loads((path / "state.json").read_text())
    learner = LearnerState(
        state["policy_version"],
        tuple(_load_weights(path, header) for header in state["weights"]),
        load((path / "optimizer.safetensors").read_bytes()),
        state["scaler"],
    )
    statistics = {prompt: tuple(rewards) for prompt, rewards in state["statistics"].items()}
    return Checkpoint(state["rounds_done"], learner, statistics)


def _load_weights(path: Path, header: dict) -> LoraWeights:
    version = header["policy_version"]
    buffer = load((path / f"weights-{version:06d}.safetensors").read_bytes())["buffer"]
    manifest = tuple((name, tuple(shape)) for name, shape in header["manifest"])
    return verified(LoraWeights(version, buffer, manifest, header["fingerprint"]))

"""Save a run's state, find the newest intact checkpoint, and load it: safetensors and JSON, nothing unpickled."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
from safetensors import SafetensorError

from ray_ddpo.common.base_parts import BASE, Base, as_tables
from ray_ddpo.common.machine import Machine
from ray_ddpo.common.model_files.file_faults import refuse_not_finite
from ray_ddpo.common.policy_weights import PolicyWeights, fingerprint
from ray_ddpo.common.run_storage.storage import Storage, StorageError
from ray_ddpo.learner.algorithms.reward_aggregation import Statistics
from ray_ddpo.learner.checkpoints.learner_state import EvaluationState, EvalVersion, LearnerState
from ray_ddpo.learner.checkpoints.shards import SHARD_BYTES, Shards, cut, grouped, read_arrays, read_buffer

MANIFEST = "manifest.json"
OWN_WEIGHTS = "weights-trained.safetensors"
REFERENCE = "weights-reference.safetensors"
OPTIMIZER = "optimizer.safetensors"
VALUE = "value.safetensors"
MISSHAPEN = (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, AttributeError, TypeError)
FOLDER_NAME = re.compile(r"round-(\d+)(?:-(\d+))?")  # rounds done, and earlier commits after the same rounds


@dataclass(frozen=True)
class Checkpoint:
    """The state that a run needs to resume: rounds done, the learner, the advantage statistics, and the rest."""

    rounds_done: int
    learner: LearnerState
    statistics: Statistics
    tracker_ids: dict[str, str] = field(default_factory=dict)  # by the tracker's name, to resume its run
    ledger_rounds: int = 0  # rounds in the ledger
    dropped: dict[int, list[int]] = field(default_factory=dict)  # by round: the images that were not trained on
    evaluation: EvaluationState = EvaluationState()
    base: Base = field(default_factory=dict)  # fingerprints of the files that the run was loaded from


def save_checkpoint(folder: Storage, checkpoint: Checkpoint, keep: int, shard_bytes: int = SHARD_BYTES) -> Storage:
    """Write `folder/round-000012`, then remove all but the newest `keep` checkpoints.

    A checkpoint is committed by its manifest, which is written last. Earlier checkpoints are touched only after that. A
    second commit after the same rounds is written to `round-000012-1`. Beside the state itself, one file of at most
    `shard_bytes` is in memory at a time.

    Returns:
        The checkpoint's folder.
    """
    target = folder.folder(_free_name(folder, checkpoint.rounds_done))
    manifest = {}
    try:
        for name, data in _files(checkpoint, _shards(checkpoint, shard_bytes)):
            manifest[name] = hashlib.sha256(data).hexdigest()
            target.write(name, data)
            del data  # free it before the next file is made
        target.write(MANIFEST, json.dumps(manifest, indent=1).encode())
    except StorageError:  # a partial checkpoint would take the space that the next attempt needs
        with contextlib.suppress(OSError):
            folder.remove(target.name)
        raise
    folder.write(
        "latest", target.name.encode()
    )  # a hint for people; the program looks for the newest intact checkpoint
    _forget(folder, target.name, keep)
    return target


def _free_name(folder: Storage, rounds_done: int) -> str:
    """Return the name after that of these rounds' last intact checkpoint, and remove a partial one of that name."""
    of_rounds = [name for name in _committed(folder) if _rounds_and_attempt(name)[0] == rounds_done]
    attempts = [_rounds_and_attempt(name)[1] for name in of_rounds if _is_intact(folder.folder(name))]
    name = f"round-{rounds_done:06d}" + (f"-{max(attempts) + 1}" if attempts else "")
    folder.remove(name)
    return name


def _forget(folder: Storage, committed: str, keep: int) -> None:
    """Remove uncommitted checkpoints, those that this commit replaces, and older ones but the newest `keep` - 1."""
    newest = _rounds_and_attempt(committed)
    older = [name for name in _committed(folder) if _rounds_and_attempt(name)[0] < newest[0]]
    kept = {committed, *older[: keep - 1]}
    kept |= {
        name for name in _committed(folder) if _rounds_and_attempt(name) > newest and _is_intact(folder.folder(name))
    }
    for name in folder.names():
        if FOLDER_NAME.fullmatch(name) and name not in kept:
            folder.remove(
                f"{name}/{MANIFEST}"
            )  # first, so that a partly removed checkpoint is not taken for a committed one
            folder.remove(name)
    folder.sweep()


def _rounds_and_attempt(name: str) -> tuple[int, int]:
    found = FOLDER_NAME.fullmatch(name)
    assert found, f"{name} is no checkpoint's folder"
    return int(found[1]), int(found[2] or 0)


def _shards(checkpoint: Checkpoint, limit: int) -> list[Shards]:
    """Return the arrays of a checkpoint, in files of at most `limit` bytes."""
    learner = checkpoint.learner
    weights = {_weights_file(each.policy_version): each for each in learner.weights}
    if learner.own_weights:
        weights[OWN_WEIGHTS] = learner.own_weights
    if learner.reference:
        weights[REFERENCE] = learner.reference
    weights |= _evaluated(checkpoint.evaluation)
    buffers = [cut(name, each.buffer, limit) for name, each in weights.items()]
    value = [grouped(VALUE, learner.value, limit)] if learner.value else []
    return [*buffers, grouped(OPTIMIZER, learner.optimizer, limit), *value]


def _as_stored(machine: Machine) -> dict[str, str]:
    """Return a machine's fields without the measured rate, which differs from start to start."""
    return {name: value for name, value in asdict(machine).items() if name != "matrix_rate"}


def _files(checkpoint: Checkpoint, shards: list[Shards]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every file but the manifest. The last file, `state.json`, describes the others."""
    learner = checkpoint.learner
    state = {
        "rounds_done": checkpoint.rounds_done,
        "policy_version": learner.policy_version,
        "weights": [_weights_header(weights) for weights in learner.weights],
        "own_weights": _weights_header(learner.own_weights) if learner.own_weights else None,
        "reference": _weights_header(learner.reference) if learner.reference else None,
        "value": bool(learner.value),
        "scaler": learner.scaler,
        "micro_batch_size": learner.micro_batch_size,
        "machine": _as_stored(learner.machine) if learner.machine else None,
        "recomputes": learner.recomputes,
        "statistics": checkpoint.statistics,
        "tracker_ids": checkpoint.tracker_ids,
        "ledger_rounds": checkpoint.ledger_rounds,
        "dropped": checkpoint.dropped,
        "evaluation": _evaluation_header(checkpoint.evaluation),
        "base": as_tables(checkpoint.base),
    }
    if several := {each.file: len(each.parts) for each in shards if len(each.parts) > 1}:
        state["shards"] = several
    for each in shards:
        yield from each.files()
    yield "state.json", json.dumps(state).encode()


def _evaluated(state: EvaluationState) -> dict[str, PolicyWeights]:
    """Return the weights of an evaluation's state, by file name."""
    found = {"average": state.average}
    for each in state.pending:
        found |= {
            f"current-{each.policy_version:06d}": each.current,
            f"average-{each.policy_version:06d}": each.average,
        }
    return {f"evaluation-{name}.safetensors": weights for name, weights in found.items() if weights is not None}


def _evaluation_header(state: EvaluationState) -> dict[str, object]:
    pending = [{"policy_version": each.policy_version, "kl": each.kl_reference_nats} for each in state.pending]
    files = {name: _weights_header(weights) for name, weights in _evaluated(state).items()}
    return {"pending": pending, "files": files}


def _load_evaluation(checkpoint: Storage, state: dict) -> EvaluationState:
    """Load the state of evaluation that `_evaluation_header` describes."""
    header = state.get("evaluation", {})
    files = {name: _load_weights(checkpoint, name, of_file, state) for name, of_file in header.get("files", {}).items()}
    pending = []
    for each in header.get("pending", ()):
        suffix = f"{each['policy_version']:06d}.safetensors"
        current, average = files[f"evaluation-current-{suffix}"], files.get(f"evaluation-average-{suffix}")
        pending.append(EvalVersion(current, average, each["kl"]))
    return EvaluationState(files.get("evaluation-average.safetensors"), tuple(pending))


def _weights_file(policy_version: int) -> str:
    return f"weights-{policy_version:06d}.safetensors"


def _weights_header(weights: PolicyWeights) -> dict[str, object]:
    return {"policy_version": weights.policy_version, "manifest": weights.manifest, "fingerprint": weights.fingerprint}


def _committed(folder: Storage) -> list[str]:
    """Return the names of checkpoints with a manifest, the newest first."""
    names = [name for name in folder.names() if FOLDER_NAME.fullmatch(name) and folder.exists(f"{name}/{MANIFEST}")]
    return sorted(names, key=_rounds_and_attempt, reverse=True)


def intact_checkpoints(folder: Storage) -> Iterator[Storage]:
    """Return the checkpoints whose files all match their manifest, the newest first."""
    found = (folder.folder(name) for name in _committed(folder))
    return (checkpoint for checkpoint in found if _is_intact(checkpoint))


def committed_checkpoints(folder: Storage) -> list[str]:
    """Return the names of all committed checkpoints, intact or damaged, the newest first."""
    return _committed(folder)


def damaged_checkpoints(folder: Storage) -> list[str]:
    """Return the names of committed checkpoints with files that do not match their manifest, the newest first."""
    return [name for name in _committed(folder) if not _is_intact(folder.folder(name))]


def newest_checkpoint(folder: Storage) -> Storage | None:
    """Return the newest intact checkpoint, or None if there is none."""
    return next(intact_checkpoints(folder), None)


def checkpoint_of(folder: Storage, rounds_done: int) -> Storage:
    """Return the newest intact checkpoint after `rounds_done` rounds.

    Raises:
        ValueError: no such checkpoint was kept.
    """
    intact = {_rounds_and_attempt(each.name)[0]: each for each in reversed(list(intact_checkpoints(folder)))}
    if rounds_done not in intact:
        there = ", ".join(map(str, sorted(intact))) or "none"
        raise ValueError(f"{folder.location} keeps no intact checkpoint after round {rounds_done}, but after: {there}")
    return intact[rounds_done]


def _is_intact(checkpoint: Storage) -> bool:
    try:
        manifest = json.loads(checkpoint.read(MANIFEST))
        return all(hashlib.sha256(checkpoint.read(name)).hexdigest() == digest for name, digest in manifest.items())
    except MISSHAPEN:  # the manifest is missing, cut off or names impossible files, or a file is missing
        return False


def load_checkpoint(checkpoint: Storage) -> Checkpoint:
    """Load a checkpoint.

    Raises:
        ValueError: the files do not have a checkpoint's format, or the weights differ from those that were saved.
    """
    try:
        return _load_checkpoint(checkpoint)
    except (KeyError, TypeError, AttributeError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{checkpoint.location} is no checkpoint that can be read: {type(error).__name__}: {error}"
        ) from error


def _load_checkpoint(checkpoint: Storage) -> Checkpoint:
    """Load a checkpoint, with whatever error a malformed file leads to."""
    state = json.loads(checkpoint.read("state.json"))
    optimizer = _load_arrays(checkpoint, OPTIMIZER, state)
    learner = LearnerState(
        state["policy_version"],
        load_weights(checkpoint),
        optimizer,
        state["scaler"],
        _load_weights(checkpoint, OWN_WEIGHTS, state["own_weights"], state) if state.get("own_weights") else None,
        state.get("micro_batch_size"),
        Machine(**state["machine"]) if state.get("machine") else None,
        state.get("recomputes"),
        _load_weights(checkpoint, REFERENCE, state["reference"], state) if state.get("reference") else None,
        _load_arrays(checkpoint, VALUE, state) if state.get("value") else {},
    )
    return Checkpoint(
        state["rounds_done"],
        learner,
        _statistics(checkpoint, state["statistics"]),
        state.get("tracker_ids", {}),
        state.get("ledger_rounds", 0),
        {int(round_index): images for round_index, images in state.get("dropped", {}).items()},
        _load_evaluation(checkpoint, state),
        BASE.validate_python(state.get("base", {})),
    )


def _load_arrays(checkpoint: Storage, file: str, state: dict) -> dict[str, np.ndarray]:
    """Load arrays by name, and raise ValueError if a number is not finite."""
    arrays = read_arrays(checkpoint, file, _num_shards(state, file))
    refuse_not_finite(f"{checkpoint.location}/{file}", arrays)
    return arrays


def _statistics(checkpoint: Storage, tables: dict) -> Statistics:
    """Convert advantage statistics from JSON, and raise ValueError if a reward is not finite."""
    found = {name: {prompt: tuple(rewards) for prompt, rewards in each.items()} for name, each in tables.items()}
    for each in found.values():
        for prompt, rewards in each.items():
            if not all(map(math.isfinite, rewards)):
                raise ValueError(
                    f"{checkpoint.location}/state.json: the last rewards of {prompt!r} hold NaN or infinity: restore "
                    "the file"
                )
    return found


def policy_versions(checkpoint: Storage) -> list[int]:
    """Return the policy versions in a checkpoint, the newest last."""
    return [header["policy_version"] for header in json.loads(checkpoint.read("state.json"))["weights"]]


def load_weights(checkpoint: Storage) -> tuple[PolicyWeights, ...]:
    """Load the weights of a checkpoint's policy versions alone, the newest last.

    Raises:
        ValueError: the weights differ from those that were saved.
    """
    state = json.loads(checkpoint.read("state.json"))
    return tuple(
        _load_weights(checkpoint, _weights_file(header["policy_version"]), header, state) for header in state["weights"]
    )


def _num_shards(state: dict, file: str) -> int:
    count = state.get("shards", {}).get(file, 1)
    if not isinstance(count, int) or not 0 < count < 100_000:
        raise ValueError(f"state.json says that {file} has {count!r} shards")
    return count


def _load_weights(checkpoint: Storage, name: str, header: dict, state: dict) -> PolicyWeights:
    """Load weights and compare them with the fingerprint in their header."""
    manifest = tuple((parameter, tuple(shape)) for parameter, shape in header["manifest"])
    size = sum(math.prod(shape) for _, shape in manifest)
    buffer = read_buffer(checkpoint, name, _num_shards(state, name), size)
    weights = PolicyWeights(header["policy_version"], buffer, manifest, header["fingerprint"])
    refuse_not_finite(
        f"{checkpoint.location}/{name}", weights.arrays()
    )  # first, because it says more than a differing fingerprint
    if fingerprint(buffer, manifest) != weights.fingerprint:
        raise ValueError(
            f"{checkpoint.location}/{name} holds other weights of version {weights.policy_version} than were saved "
            "there: their fingerprint is another one; restore the file, or remove this checkpoint, which goes back to "
            "the one before"
        )
    return weights

"""Save a run's state, find the newest whole checkpoint, and read it back: safetensors and JSON, nothing unpickled."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from safetensors import SafetensorError

from ray_ddpo.common.base_parts import BASE, Base, as_tables
from ray_ddpo.common.machine import Machine
from ray_ddpo.common.model_files.file_faults import refuse_not_finite
from ray_ddpo.common.policy_weights import PolicyWeights, fingerprint
from ray_ddpo.common.run_storage.storage import Storage, StorageError
from ray_ddpo.learner.algorithms.reward_aggregation import Statistics
from ray_ddpo.learner.checkpoints.learner_state import Evaluated, EvaluationState, LearnerState
from ray_ddpo.learner.checkpoints.shards import SHARD_BYTES, Shards, cut, grouped, read_arrays, read_buffer

MANIFEST = "manifest.json"
OWN_WEIGHTS = "weights-trained.safetensors"
OPTIMIZER = "optimizer.safetensors"
MISSHAPEN = (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, AttributeError, TypeError)
FOLDER_NAME = re.compile(r"round-(\d+)(?:-(\d+))?")  # rounds done, and how often they were committed before


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on: rounds done, the learner, the advantage statistics, and what lies beside them."""

    rounds_done: int
    learner: LearnerState
    statistics: Statistics
    tracker_ids: dict[str, str] = field(default_factory=dict)  # under which a tracker goes on, by its name
    ledger_rounds: int = 0  # in the ledger
    dropped: dict[int, list[int]] = field(default_factory=dict)  # round: its images that were not learned from
    evaluation: EvaluationState = EvaluationState()
    base: Base = field(default_factory=dict)  # what the weights stand on


def save_checkpoint(folder: Storage, checkpoint: Checkpoint, keep: int, shard_bytes: int = SHARD_BYTES) -> Storage:
    """Write `folder/round-000012`; then forget all but the newest `keep`. A commit is its manifest, written last.

    What was committed before is touched only after that; the same rounds once more go into `round-000012-1`. One file of at
    most `shard_bytes` is in memory at a time, beside the state itself.
    """
    target = folder.folder(_free_name(folder, checkpoint.rounds_done))
    manifest = {}
    try:
        for name, data in _files(checkpoint, _shards(checkpoint, shard_bytes)):
            manifest[name] = hashlib.sha256(data).hexdigest()
            target.write(name, data)
            del data  # before the next one is made
        target.write(MANIFEST, json.dumps(manifest, indent=1).encode())
    except StorageError:  # half of a checkpoint would take the room that the next attempt needs
        with contextlib.suppress(OSError):
            folder.remove(target.name)
        raise
    folder.write("latest", target.name.encode())  # a hint for people: the newest whole checkpoint is looked for
    _forget(folder, target.name, keep)
    return target


def _free_name(folder: Storage, rounds_done: int) -> str:
    """The name after that of these rounds' last whole checkpoint; half of one in its place is cleared away."""
    of_rounds = [name for name in _committed(folder) if _place(name)[0] == rounds_done]
    attempts = [_place(name)[1] for name in of_rounds if _is_whole(folder.folder(name))]
    name = f"round-{rounds_done:06d}" + (f"-{max(attempts) + 1}" if attempts else "")
    folder.remove(name)
    return name


def _forget(folder: Storage, committed: str, keep: int) -> None:
    """Remove what was never committed, what this commit replaces, and the older ones but the newest `keep` - 1."""
    newest = _place(committed)
    older = [name for name in _committed(folder) if _place(name)[0] < newest[0]]
    kept = {committed, *older[: keep - 1]}
    kept |= {name for name in _committed(folder) if _place(name) > newest and _is_whole(folder.folder(name))}
    for name in folder.names():
        if FOLDER_NAME.fullmatch(name) and name not in kept:
            folder.remove(f"{name}/{MANIFEST}")  # first: half of a checkpoint is none
            folder.remove(name)
    folder.sweep()


def _place(name: str) -> tuple[int, int]:
    found = FOLDER_NAME.fullmatch(name)
    assert found, f"{name} is no checkpoint's folder"
    return int(found[1]), int(found[2] or 0)


def _shards(checkpoint: Checkpoint, limit: int) -> list[Shards]:
    """The arrays of a checkpoint, in files of at most `limit` bytes."""
    learner = checkpoint.learner
    weights = {_weights_file(each.policy_version): each for each in learner.weights}
    if learner.own_weights:
        weights[OWN_WEIGHTS] = learner.own_weights
    weights |= _evaluated(checkpoint.evaluation)
    buffers = [cut(name, each.buffer, limit) for name, each in weights.items()]
    return [*buffers, grouped(OPTIMIZER, learner.optimizer, limit)]


def _files(checkpoint: Checkpoint, shards: list[Shards]) -> Iterator[tuple[str, bytes]]:
    """Every file but the manifest, one at a time; the last one says what the others are."""
    learner = checkpoint.learner
    state = {
        "rounds_done": checkpoint.rounds_done,
        "policy_version": learner.policy_version,
        "weights": [_weights_header(weights) for weights in learner.weights],
        "own_weights": _weights_header(learner.own_weights) if learner.own_weights else None,
        "scaler": learner.scaler,
        "micro_batch_size": learner.micro_batch_size,
        "machine": asdict(learner.machine) if learner.machine else None,
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
    """The weights of an evaluation's state by the file that each lies in."""
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
    header = state.get("evaluation", {})
    files = {name: _load_weights(checkpoint, name, of_file, state) for name, of_file in header.get("files", {}).items()}
    pending = []
    for each in header.get("pending", ()):
        place = f"{each['policy_version']:06d}.safetensors"
        current, average = files[f"evaluation-current-{place}"], files.get(f"evaluation-average-{place}")
        pending.append(Evaluated(current, average, each["kl"]))
    return EvaluationState(files.get("evaluation-average.safetensors"), tuple(pending))


def _weights_file(policy_version: int) -> str:
    return f"weights-{policy_version:06d}.safetensors"


def _weights_header(weights: PolicyWeights) -> dict[str, object]:
    return {"policy_version": weights.policy_version, "manifest": weights.manifest, "fingerprint": weights.fingerprint}


def _committed(folder: Storage) -> list[str]:
    """The names of checkpoints with a manifest, the newest first."""
    names = [name for name in folder.names() if FOLDER_NAME.fullmatch(name) and folder.exists(f"{name}/{MANIFEST}")]
    return sorted(names, key=_place, reverse=True)


def whole_checkpoints(folder: Storage) -> Iterator[Storage]:
    """The checkpoints whose files are all what their manifest says, the newest first."""
    found = (folder.folder(name) for name in _committed(folder))
    return (checkpoint for checkpoint in found if _is_whole(checkpoint))


def committed_checkpoints(folder: Storage) -> list[str]:
    """Return the names of all checkpoints that were committed, whole or damaged by now, the newest first."""
    return _committed(folder)


def damaged_checkpoints(folder: Storage) -> list[str]:
    """Return the names of committed checkpoints whose files are not what their manifest says, the newest first."""
    return [name for name in _committed(folder) if not _is_whole(folder.folder(name))]


def newest_checkpoint(folder: Storage) -> Storage | None:
    """The newest whole checkpoint; None where there is none."""
    return next(whole_checkpoints(folder), None)


def checkpoint_of(folder: Storage, rounds_done: int) -> Storage:
    """Return the newest whole checkpoint after so many rounds. ValueError: it was not kept."""
    whole = {_place(each.name)[0]: each for each in reversed(list(whole_checkpoints(folder)))}
    if rounds_done not in whole:
        there = ", ".join(map(str, sorted(whole))) or "none"
        raise ValueError(f"{folder.location} keeps no whole checkpoint after round {rounds_done}, but after: {there}")
    return whole[rounds_done]


def _is_whole(checkpoint: Storage) -> bool:
    try:
        manifest = json.loads(checkpoint.read(MANIFEST))
        return all(hashlib.sha256(checkpoint.read(name)).hexdigest() == digest for name, digest in manifest.items())
    except MISSHAPEN:  # no manifest, one that was cut off or names what cannot be there, a file that is gone
        return False


def load_checkpoint(checkpoint: Storage) -> Checkpoint:
    """Read a checkpoint. ValueError: it is not laid out as checkpoints are, or its weights are not what they were saved as."""
    try:
        return _load_checkpoint(checkpoint)
    except (KeyError, TypeError, AttributeError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{checkpoint.location} is no checkpoint that can be read: {type(error).__name__}: {error}"
        ) from error


def _load_checkpoint(checkpoint: Storage) -> Checkpoint:
    state = json.loads(checkpoint.read("state.json"))
    optimizer = read_arrays(checkpoint, OPTIMIZER, _num_shards(state, OPTIMIZER))
    refuse_not_finite(f"{checkpoint.location}/{OPTIMIZER}", optimizer)
    learner = LearnerState(
        state["policy_version"],
        load_weights(checkpoint),
        optimizer,
        state["scaler"],
        _load_weights(checkpoint, OWN_WEIGHTS, state["own_weights"], state) if state.get("own_weights") else None,
        state.get("micro_batch_size"),
        Machine(**state["machine"]) if state.get("machine") else None,
    )
    return Checkpoint(
        state["rounds_done"],
        learner,
        _statistics(checkpoint, state["statistics"]),
        state.get("tracker_ids", {}),
        state.get("ledger_rounds", 0),
        {int(round): images for round, images in state.get("dropped", {}).items()},
        _load_evaluation(checkpoint, state),
        BASE.validate_python(state.get("base", {})),
    )


def _statistics(checkpoint: Storage, tables: dict) -> Statistics:
    found = {name: {prompt: tuple(rewards) for prompt, rewards in each.items()} for name, each in tables.items()}
    for each in found.values():
        for prompt, rewards in each.items():
            if not all(map(math.isfinite, rewards)):
                raise ValueError(
                    f"{checkpoint.location}/state.json: the last rewards of {prompt!r} hold NaN or infinity: restore the file"
                )
    return found


def policy_versions(checkpoint: Storage) -> list[int]:
    """The policy versions that a checkpoint holds, the newest last."""
    return [header["policy_version"] for header in json.loads(checkpoint.read("state.json"))["weights"]]


def load_weights(checkpoint: Storage) -> tuple[PolicyWeights, ...]:
    """A checkpoint's policy versions alone, the newest last. ValueError: they are not what they were saved as."""
    state = json.loads(checkpoint.read("state.json"))
    return tuple(
        _load_weights(checkpoint, _weights_file(header["policy_version"]), header, state) for header in state["weights"]
    )


def _num_shards(state: dict, file: str) -> int:
    count = state.get("shards", {}).get(file, 1)
    if not isinstance(count, int) or not 0 < count < 100_000:
        raise ValueError(f"{file} is said to lie in {count!r} shards")
    return count


def _load_weights(checkpoint: Storage, name: str, header: dict, state: dict) -> PolicyWeights:
    manifest = tuple((parameter, tuple(shape)) for parameter, shape in header["manifest"])
    size = sum(math.prod(shape) for _, shape in manifest)
    buffer = read_buffer(checkpoint, name, _num_shards(state, name), size)
    weights = PolicyWeights(header["policy_version"], buffer, manifest, header["fingerprint"])
    refuse_not_finite(f"{checkpoint.location}/{name}", weights.arrays())  # first: it says more than a fingerprint
    if fingerprint(buffer, manifest) != weights.fingerprint:
        raise ValueError(
            f"{checkpoint.location}/{name} holds other weights of version {weights.policy_version} than were saved there: "
            "their fingerprint is another one; restore the file, or remove this checkpoint, which goes back to the one before"
        )
    return weights

"""Checks before any sampling: versions, device, authentication, folders, disk, trackers, hub, weights, rewards."""

import importlib.metadata
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.model_files.model_hub import Weights, first_line, hub_answers, is_hub_name, missing_files
from ray_ddpo.common.package_versions import VERSIONED
from ray_ddpo.common.policy_versions import num_kept
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import elastic_roles
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.run_storage.lease import runs_it
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.trackers.tracker import Tracker
from ray_ddpo.common.trajectory import ImageBatch
from ray_ddpo.deploy.commands.doctor.guard import Finding, Level, guarded
from ray_ddpo.deploy.commands.plan.numbers import Plan, in_bytes
from ray_ddpo.deploy.hub import NotPushed, license_of, may_push

PYPROJECT = Path(__file__).parents[4] / "pyproject.toml"
ON_CPU = RuntimeTable(device="cpu")
MADE_UP = (Prompt("a photo of a cat"), Prompt("a photo of a dog"))
NOISE_SIZE = 256  # pixels of the image that a reward is tried on
NOISE_FRAMES = 3  # of a clip
SERVICE_ADVICE = (
    "see that the service runs at this address; correct what the message names, such as the model or the key"
)
NEARLY = 0.8  # share of the available bytes from which on a finding is a warning


def version_findings() -> Iterator[Finding]:
    """Report dependencies that are missing or too old, else the versions that decide a run's bits."""
    installed = {name: _installed(name) for name in VERSIONED}
    versions = ", ".join(f"{name} {version or 'from its source'}" for name, version in installed.items())
    wrong = [text for requirement in _dependencies() for text in _unmet(requirement)]
    if wrong:
        yield Finding("fault", "versions", "; ".join(wrong), "pip install --constraint constraints.txt --editable .")
    else:
        yield Finding("ok", "versions", f"python {sys.version.partition(' ')[0]}, {versions}")


def _dependencies() -> list[Requirement]:
    """Read the dependencies from pyproject.toml if it is there (a job's working directory), else from the package."""
    if PYPROJECT.is_file():
        texts = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        texts = importlib.metadata.requires("ray-ddpo") or []
    requirements = [Requirement(text) for text in texts]
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def _unmet(requirement: Requirement) -> Iterator[str]:
    version = _installed(requirement.name)
    if version is None:
        yield f"{requirement.name} is not installed"
    elif not requirement.specifier.contains(version, prereleases=True):
        yield f"{requirement.name} is {version}, and {requirement.specifier} is needed"


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_finding(recipe: Recipe) -> Finding:
    """Report this machine's GPUs, and whether the recipe uses them."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    roles = {"learner": recipe.learner, **elastic_roles(recipe)}
    without = [f"{role}.num_gpus" for role, table in roles.items() if not table.num_gpus]
    names = ", ".join(f"{gpu.name} with {in_bytes(gpu.total_memory)}" for gpu in gpus)
    here = names or f"CPU, {os.cpu_count()} cores, no GPU"
    if recipe.runtime.device == "cuda" and without:
        found = f"{here}; runtime.device is 'cuda', and an actor without num_gpus sees no GPU"
        return Finding("fault", "device", found, f"set {', '.join(without)}, or runtime.device auto")
    if gpus and len(without) == len(roles) and recipe.runtime.device == "auto":
        return Finding("warning", "device", f"{here}; no role asks for it, so all run on the CPU", f"set {without[0]}")
    return Finding("ok", "device", here)


def authentication_finding(environment: Mapping[str, str], home: Path) -> Finding:
    """Check that this shell can authenticate: Ray sends a token only if RAY_AUTH_MODE says so on both sides."""
    subject, mode, attaches = "Ray's token", environment.get("RAY_AUTH_MODE"), "RAY_ADDRESS" in environment
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    places = {
        "RAY_AUTH_TOKEN": "RAY_AUTH_TOKEN" in environment,
        "RAY_AUTH_TOKEN_PATH": path is not None and Path(path).is_file(),
        "~/.ray/auth_token": (home / ".ray" / "auth_token").is_file(),
    }
    place = next((name for name, there in places.items() if there), None)
    said = f"RAY_AUTH_MODE is {mode}" if mode else "RAY_AUTH_MODE is not set"
    has = f"a token is in {place}" if place else "there is no token"
    if mode == "token" and attaches and place is None:
        advice = "export RAY_AUTH_TOKEN_PATH=… (a copy of the cluster's ~/.ray/auth_token)"
        return Finding("fault", subject, f"{said}, and {has} for the cluster of RAY_ADDRESS", advice)
    if mode == "disabled" and not attaches:
        return Finding("ok", subject, said)
    if mode != "token" and (attaches or place):
        why = "a cluster that asks for one refuses this shell, `ray job submit` too"
        return Finding("warning", subject, f"{said}, {has}: {why}", "export RAY_AUTH_MODE=token")
    return Finding("ok", subject, f"{said}, {has}")


def folder_findings(recipe: Recipe) -> Iterator[Finding]:
    """Check that the run's folder can be written and is not in use. Leaves no files."""
    folder = RunFolder(recipe.run_path())
    try:
        _probe(folder)
        owner, has_a_run = runs_it(folder), folder.storage.exists(folder.recipe)
    except (ValueError, OSError) as error:
        yield Finding("fault", "run folder", str(error), "give --output_dir a folder that can be written")
        return
    if owner is not None:
        yield Finding(
            "fault", "run folder", f"{folder.location} is in use by {owner}", "stop it, or give another --name"
        )
    elif has_a_run:
        advice = "resume with --resume auto, or give another --name"
        yield Finding("warning", "run folder", f"{folder.location} has a run of this name", advice)
    else:
        yield Finding("ok", "run folder", f"{folder.location} can be written")


def _probe(folder: RunFolder) -> None:
    """Write to the folder. If it does not exist, probe a sibling folder, because a run may start in it meanwhile."""
    if folder.storage.names():
        folder.create()
        return
    probe = RunFolder(f"{folder.location}.doctor-{os.getpid()}")
    path = probe.storage.local_path
    missing = [parent for parent in path.parents if not parent.exists()] if path else []
    try:
        probe.create()
    finally:
        probe.storage.remove("")
        for parent in missing:  # the innermost first
            with suppress(OSError):  # another process has put files there
                parent.rmdir()


def checkpoint_bytes(recipe: Recipe, numbers: Plan) -> int:
    """Return a checkpoint's size: max_policy_lag + 1 versions of the weights, moving average, optimizer state."""
    versions = num_kept(recipe.kept_lag) + (recipe.evaluation.ema_decay is not None)
    return numbers.broadcast_bytes * versions + numbers.optimizer_bytes


def disk_finding(recipe: Recipe, numbers: Plan) -> Finding:
    """Compare the disk space with the kept checkpoints and the checkpoint being written."""
    kept = recipe.checkpoint.keep + 1
    needed = checkpoint_bytes(recipe, numbers) * kept
    path = RunFolder(recipe.run_path()).storage.local_path
    what = f"{in_bytes(needed)} for {kept} checkpoints"
    if path is None:
        return Finding("ok", "disk", f"{what}, on {recipe.output_dir}")
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    disk = shutil.disk_usage(there)
    if not disk.total:  # such as /proc
        return Finding("fault", "disk", f"{what}, and {there} is on no disk", "give --output_dir a folder on a disk")
    return compared("disk", what, needed, disk.free, "set checkpoint.keep lower, or give --output_dir a larger disk")


def compared(subject: str, what: str, needed: float, there: float, advice: str) -> Finding:
    """Compare `needed` bytes with available ones: too many are a fault, nearly too many a warning."""
    level: Level = "fault" if needed > there else "warning" if needed > NEARLY * there else "ok"
    return Finding(level, subject, f"{what}, of {in_bytes(int(there))} free", "" if level == "ok" else advice)


def tracker_findings(trackers: dict[str, Tracker]) -> Iterator[Finding]:
    """Check that the trackers' packages are installed, and report where wandb would write."""
    for tracker in trackers.values():
        tracker.check()
    if "wandb" in trackers:
        from ray_ddpo.common.trackers.wandb_run import connection

        where, why = connection()
        advice = "wandb login, or export WANDB_API_KEY=…; else `wandb sync` afterwards" if where == "offline" else ""
        asked = "WANDB_MODE" in os.environ
        found = f"{where}: {why}" if why else where
        yield Finding("ok" if where == "online" or asked else "warning", "wandb", found, "" if asked else advice)
    yield Finding("ok", "trackers", ", ".join(trackers))


def push_findings(recipe: Recipe) -> Iterator[Finding]:
    """Check that the run may be published, if the recipe asks for it. Changes nothing on the hub."""
    if recipe.push.repo is None:
        return
    try:
        user = may_push(recipe)
    except (ValueError, NotPushed) as error:
        yield Finding(
            "fault", "push", str(error), "or leave push.repo out: `ddpo push` publishes a run when it has ended"
        )
        return
    yield Finding("ok", "push", f"{user} may publish {recipe.push.repo}, under {license_of(recipe)}")


def weights_findings(subject: str, name: str, needs: tuple[Weights, ...]) -> list[Finding]:
    """Report missing files of a component: a warning if the hub has them, else a fault."""
    return [_lack(subject, name, weights, missing) for weights in needs if (missing := missing_files(weights))]


def _lack(subject: str, name: str, weights: Weights, missing: list[str]) -> Finding:
    """Report missing files, with how to get them."""
    if not is_hub_name(weights.source) or Path(os.path.expanduser(weights.source)).is_dir():
        found = f"{name} needs {', '.join(missing)} in {weights.source}, and they are not there"
        return Finding("fault", subject, found, f"copy them there, or set {weights.key}")
    found = f"{name} needs {', '.join(missing)} of the hub's {weights.source}, not downloaded so far"
    if hub_answers():
        return Finding("warning", subject, found, f"hf download {weights.source}, or an actor does it at the start")
    advice = f"copy them to this machine, and set {weights.key} to where they are"
    return Finding("fault", subject, f"{found}, and the hub does not answer", advice)


def reward_findings(
    subject: str, name: str, reward: Reward, runtime: RuntimeTable = ON_CPU, prompts: tuple[Prompt, ...] = MADE_UP
) -> list[Finding]:
    """Load a reward as its worker does, and score an image of noise for each of `prompts`."""
    return list(guarded(subject, _tried, subject, name, reward, runtime, prompts))


def _tried(
    subject: str, name: str, reward: Reward, runtime: RuntimeTable, prompts: tuple[Prompt, ...]
) -> Iterator[Finding]:
    """Check a reward's files, load it, and score noise."""
    lacking = weights_findings(subject, name, reward.needs())
    if lacking:
        yield from lacking
        return
    worker = RewardWorker({name: reward}, RewardPoolTable(), runtime)
    try:
        reward.check()
    except ValueError as error:
        yield Finding("fault", subject, f"{name} cannot score: {first_line(error)}", SERVICE_ADVICE)
        return
    what, frames = ("a clip", (NOISE_FRAMES,)) if reward.takes_clips else ("an image", ())
    size = (len(prompts), *frames, NOISE_SIZE, NOISE_SIZE, 3)
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    scores = worker.score(ImageBatch(noise, prompts))
    if scores.dropped:
        reason = next(iter(scores.dropped.values()))
        yield Finding("warning", subject, f"{name} can be loaded; {reason}, {what} of noise")
    else:
        yield Finding("ok", subject, f"{name} can be loaded, and scores")

"""Python objects in the place of a recipe's tables: rewards, prompts, algorithms, trackers, families and pipelines."""

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.contract import check_signature
from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.base_parts import fingerprint
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.input_images import IMAGE, MASK
from ray_ddpo.common.prompts import PROMPTS, PromptFunction, PromptSource, Texts
from ray_ddpo.common.prompts import File as PromptFile
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component, Registry, component_class
from ray_ddpo.common.run_storage.run_folder import GIVEN_PROMPTS, MODEL, RunFolder
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.common.trackers.callback import Callback
from ray_ddpo.common.trackers.tracker import Metrics, Tracker
from ray_ddpo.common.user_code.by_value import is_by_value, reference
from ray_ddpo.deploy.driver.components import Given
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.algorithm import Algorithm

AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # Pillow's modes that a PNG keeps
TOO_DEEP = ("I", "F")  # modes of more than 8 bits a channel, which a conversion would cut off

RewardArgument = Reward | Callable[..., Any]
PromptsArgument = PromptSource | Sequence[str] | Sequence[Mapping[str, Any]] | Callable[..., Any]


def components_given(
    *,
    reward: RewardArgument | Mapping[str, RewardArgument] | None = None,
    prompts: PromptsArgument | None = None,
    policy: PolicyConfig | None = None,
    algorithm: Algorithm | None = None,
    trackers: Iterable[Tracker] = (),
    on_round: Callable[[Metrics], object] | None = None,
) -> Given:
    """Return what `train` was handed over as components.

    Raises:
        ValueError: an argument is no object of its kind. The argument is named.
    """
    for name, value, kind in (("policy", policy, PolicyConfig), ("algorithm", algorithm, Algorithm)):
        if value is not None:
            _check_kind(name, value, kind)
    live = {}
    for tracker in trackers:
        _check_kind("trackers", tracker, Tracker)
        live[_name_of(tracker, TRACKERS)] = tracker
    if on_round is not None:
        if not callable(on_round):
            raise ValueError(f"on_round= is {on_round!r}: it must be a function of one round's metrics")
        live["on_round"] = Callback.of(on_round)
    return Given(
        policy=policy,
        prompts=None if prompts is None else _prompt_source(prompts),
        algorithm=algorithm,
        rewards={} if reward is None else _rewards(reward),
        trackers=live,
    )


def with_components(recipe: Recipe, given: Given, pipeline: Any = None) -> Recipe:
    """Return the recipe with tables that say what was handed over, as far as a file can.

    Args:
        recipe: the recipe.
        given: components in the place of tables.
        pipeline: a live pipeline or its folder, in the place of `policy.model`.

    Raises:
        ValueError: a policy and a pipeline are given, or the pipeline cannot be used.
    """
    if given.policy is not None and pipeline is not None:
        raise ValueError("policy= and pipeline= are both given: a policy's model is its own, so give one of them")
    tables = recipe.model_dump()
    if pipeline is not None:
        tables["policy"] = {**tables["policy"], "model": _pipeline_folder(pipeline, recipe)}
    if given.policy is not None:
        tables["policy"] = _table(given.policy, POLICIES)
    if given.algorithm is not None:
        tables["algorithm"] = _table(given.algorithm, ALGORITHMS)
    if given.prompts is not None:
        group = {"images_per_prompt": recipe.prompts.images_per_prompt}
        tables["prompts"] = {**_table(given.prompts, PROMPTS), **group}
    if given.rewards:
        rewards = [{**_table(reward, REWARDS), "label": name} for name, reward in given.rewards.items()]
        several = len(rewards) > 1
        tables |= {"reward": None if several else rewards[0], "rewards": rewards if several else ()}
    named = [_table(tracker, TRACKERS) for tracker in given.trackers.values() if not isinstance(tracker, Callback)]
    named = [table for table in named if not is_by_value(table["name"])]  # no reader of the run needs a tracker
    tables["trackers"] = [*tables["trackers"], *named]
    return Recipe.parse(tables, recipe.name)


def _pipeline_folder(pipeline: Any, recipe: Recipe) -> str:
    """Return the folder of a pipeline, which is saved in the run's folder if it is a live one of diffusers.

    Raises:
        ValueError: it is of another family than the recipe, has adapters, or differs from the one that the run began with.
    """
    if isinstance(pipeline, str | Path):
        return str(Path(pipeline).absolute()) if Path(pipeline).is_dir() else str(pipeline)
    kind, family = type(pipeline).__name__, recipe.policy.name
    expected = getattr(component_class(POLICIES, family, "policy", PolicyConfig), "pipeline_class", None)
    if kind != expected:
        takes = f"takes a {expected}" if expected else "is made of no pipeline of diffusers"
        raise ValueError(f"pipeline= is a {kind}, and the recipe's policy.name {family!r} {takes}: load such a recipe")
    adapted = [name for name, part in pipeline.components.items() if getattr(part, "peft_config", None)]
    if adapted:
        raise ValueError(
            f"pipeline= has adapters in its {', '.join(adapted)}: call fuse_lora() and unload_lora_weights(), or give the LoRA's "
            "file as policy.lora.path"
        )
    folder = RunFolder(recipe.run_path())
    if folder.storage.local_path is None:
        raise ValueError(
            f"pipeline= is a live pipeline, and the run's folder {folder.location} is no folder of this machine: save the "
            "pipeline where all machines see it, and pass that path"
        )
    place = folder.storage.local_path / MODEL
    if not folder.storage.exists(folder.recipe):  # else the folder belongs to a run
        pipeline.save_pretrained(place)
        print(f"pipeline= is saved in {place}", flush=True)
        return str(place)
    with tempfile.TemporaryDirectory(dir=folder.storage.local_path) as scratch:
        pipeline.save_pretrained(scratch)
        before, now = _weights(place), _weights(Path(scratch))
    if differing := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise ValueError(
            f"pipeline= has other weights than the run in {folder.location} began with ({', '.join(differing)}): pass the same "
            "pipeline, or give the recipe another name"
        )
    return str(place)


def stored_rows(prompts: PromptsArgument | None, recipe: Recipe) -> PromptsArgument | None:
    """Return prompts as given. Of rows, whose images may be Python objects, return a file in the run's folder.

    Raises:
        ValueError: a row has no prompt or an image that is none, the run's folder is no folder of this machine, or its
            run began with other rows.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        return prompts
    rows = [row for row in prompts if isinstance(row, Mapping)]
    if len(rows) < len(prompts):
        return prompts
    folder = RunFolder(recipe.run_path())
    if folder.storage.local_path is None:
        raise ValueError(
            f"prompts= has rows, and the run's folder {folder.location} is no folder of this machine: write them to a "
            "file that all machines see, and give prompts.path"
        )
    place = folder.storage.local_path.absolute() / GIVEN_PROMPTS
    place.mkdir(parents=True, exist_ok=True)
    lines = [_stored_row(f"prompts= has row {number}", row, place) for number, row in enumerate(rows, 1)]
    file, text = place / "prompts.jsonl", "".join(f"{line}\n" for line in lines)
    if folder.storage.exists(folder.recipe) and file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"prompts= has other rows than the run in {folder.location} began with: pass the same, or give the recipe "
            "another name"
        )
    file.write_text(text, encoding="utf-8")
    columns: dict[str, Any] = {f"{name}_column": name for name in (IMAGE, MASK) if any(name in row for row in rows)}
    return PromptFile(path=str(file), column="prompt", **columns)


def _stored_row(where: str, row: Mapping[str, Any], place: Path) -> str:
    """Return a row as JSON, with the paths of its images. Images that are no paths are saved, named by their content."""
    if not isinstance(row.get("prompt"), str):
        raise ValueError(f"{where} without a text called 'prompt': it has {sorted(row)}")
    stored = dict(row)
    for name in (IMAGE, MASK):
        value = row.get(name)
        if isinstance(value, list | tuple):
            stored[name] = [
                _stored_image(f"{where}, {name} {number}", each, place) for number, each in enumerate(value, 1)
            ]
        elif name in row:
            stored[name] = _stored_image(f"{where}, {name}", value, place)
    try:
        return json.dumps(stored, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}, whose metadata is not what JSON holds: {error}") from None


def _stored_image(where: str, value: Any, place: Path) -> str:
    """Return an image's path, or save a PIL image or an array as PNG and return the file's name."""
    if isinstance(value, str | Path):
        return str(Path(os.path.expanduser(value)).absolute())
    if isinstance(value, np.ndarray):
        pixels = value.astype(np.uint8) * 255 if value.dtype == bool else value
        if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2:
            raise ValueError(f"{where} is {value.dtype} of shape {value.shape}: give uint8 [H, W, 3], or a mask [H, W]")
        value = Image.fromarray(pixels)
    if not isinstance(value, Image.Image):
        raise ValueError(f"{where} is a {type(value).__name__}: give a path, a PIL image or an array")
    if value.mode in TOO_DEEP:
        raise ValueError(f"{where} is an image of Pillow's mode {value.mode}: it must have at most 8 bits a channel")
    buffer = io.BytesIO()
    (value if value.mode in AS_PNG else value.convert("RGB")).save(buffer, "PNG")
    name = f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:32]}.png"
    (place / name).write_bytes(buffer.getvalue())
    return name


def _weights(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of weights, by its place below the folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): fingerprint([file]) for file in files}


def _check_kind(argument: str, value: Any, kind: type[Component]) -> None:
    if not isinstance(value, kind):
        shown = value.__name__ if isinstance(value, type) else type(value).__name__
        made = f", and is the class {shown} itself: call it" if isinstance(value, type) else f", and is a {shown}"
        raise ValueError(f"{argument}= must be an object of a class that is derived from {kind.__name__}{made}")


def _rewards(reward: RewardArgument | Mapping[str, RewardArgument]) -> dict[str, Reward]:
    if isinstance(reward, Mapping):
        if not reward:
            raise ValueError("reward= is an empty dictionary: name at least one reward")
        return {name: _reward(each) for name, each in reward.items()}
    made = _reward(reward)
    name = getattr(reward, "__name__", "function") if isinstance(made, FunctionReward) else _name_of(made, REWARDS)
    return {re.sub(r"\W", "_", name.rpartition(":")[2]) if name != "<lambda>" else "function": made}


def _reward(reward: RewardArgument) -> Reward:
    if isinstance(reward, Reward):
        return reward
    check_signature(reward, f"reward={getattr(reward, '__name__', type(reward).__name__)}")
    return FunctionReward.of(reward)


def _prompt_source(prompts: PromptsArgument) -> PromptSource:
    """Return the prompt source of a list or function. ValueError: it is neither, or has no texts."""
    if isinstance(prompts, PromptSource):
        return prompts
    if isinstance(prompts, str):
        raise ValueError(f"prompts= is the text {prompts!r}: give a list of texts")
    if isinstance(prompts, type) or not (callable(prompts) or isinstance(prompts, Sequence)):
        raise ValueError(f"prompts= is {prompts!r}: it must be a list of texts, a function, or a PromptSource")
    if callable(prompts):
        return PromptFunction.of(prompts)
    texts = tuple(text for text in prompts if isinstance(text, str))
    if not texts or len(texts) < len(prompts):
        raise ValueError(f"prompts= is {list(prompts)!r}: it must have at least one text, and texts alone")
    return Texts(texts=texts)


def _name_of(component: Component, registry: Registry) -> str:
    """Return the name of a component's class in a recipe: the registry's, else `module:Class`."""
    path = f"{type(component).__module__}:{type(component).__qualname__}"
    return next((name for name, known in registry.items() if known == path), reference(type(component)))


def _table(component: Component, registry: Registry) -> dict[str, Any]:
    return {**component.model_dump(), "name": _name_of(component, registry)}

"""Change a copy of a tiny model as published folders differ: other names, other files, other weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
STEMS = {"text_encoder": "model", "text_encoder_2": "model", "text_encoder_3": "model"}


def copied(model: Path, folder: Path) -> Path:
    """Copy a model to a folder that is not there yet."""
    return Path(shutil.copytree(model, folder))


def weights_file(model: Path, part: str) -> Path:
    """Return the usual file of a part's weights."""
    return model / part / f"{STEMS.get(part, 'diffusion_pytorch_model')}.safetensors"


def change_weights(model: Path, part: str, change: Callable[[State], State]) -> None:
    """Write a part's weights again, changed."""
    path = weights_file(model, part)
    save_file(change(load_file(path)), path, {"format": "pt"})


def without(name: str) -> Callable[[State], State]:
    """Leave out each weight with this in its name."""
    return lambda state: {each: value for each, value in state.items() if name not in each}


def renamed(old: str, new: str) -> Callable[[State], State]:
    """Replace a part of each name; an empty one: put `new` before all."""
    return lambda state: {each.replace(old, new) if old else new + each: value for each, value in state.items()}


def change_json(path: Path, **keys: Any) -> None:
    """Give keys of a JSON file other values; ... takes a key away."""
    table = json.loads(path.read_text())
    table.update(keys)
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))


def save_variant(model: Path, part: str, variant: str, shards: bool = False) -> None:
    """Replace a part's weights by those of a variant, in half precision; in several files if asked for."""
    path = weights_file(model, part)
    state = {name: value.half() for name, value in load_file(path).items()}
    path.unlink()
    if not shards:
        save_file(state, path.with_name(f"{path.stem}.{variant}.safetensors"), {"format": "pt"})
        return
    names, where = sorted(state), {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"{path.stem}.{variant}-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in chosen}, path.with_name(file), {"format": "pt"})
        where |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    path.with_name(f"{path.stem}.safetensors.index.{variant}.json").write_text(json.dumps(index))

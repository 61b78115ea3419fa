"""ddpo migrate: convert the DDPOConfig of a TRL run to a recipe, with notes on differences."""

import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from ray_ddpo.common.balance import Layout, RoundLoad, best
from ray_ddpo.common.diffusion.memory.network_work import ASSUMED_BOTH
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import explain
from ray_ddpo.deploy.commands.migrate.trl_config import COUNTERPARTS, TRL_VERSION, DDPOConfig, TrlRun
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.deploy.driver.gpu_layout import keys_of

LORA = {"rank": 4, "alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
NOT_IN_A_CONFIG = (
    "Not in a DDPOConfig: policy.model and the reward are those asked for, the LoRA is that of TRL's "
    "DefaultDDPOStableDiffusionPipeline, and the prompts are the paper's 45 animals, of which TRL's example has 27."
)


@dataclass(frozen=True)
class Migrated:
    """A recipe's tables, with notes on how the config's fields were converted."""

    tables: dict[str, Any]
    notes: list[str]

    @property
    def lines(self) -> list[str]:
        """Return the notes, wrapped for a comment."""
        return [line for note in self.notes for line in textwrap.wrap(note, 118, subsequent_indent="  ")]

    @property
    def toml(self) -> str:
        """Return the recipe as TOML, with the notes as a comment at its head."""
        return "".join(f"# {line}\n" for line in self.lines) + tomli_w.dumps(self.tables)


def migrate(config: dict[str, Any], processes: int, model: str, reward: str) -> Migrated:
    """Convert the fields of a DDPOConfig to a recipe. Missing fields have TRL's default.

    Args:
        config: the fields.
        processes: number of processes of accelerate, each with a GPU.
        model: the recipe's model.
        reward: a name, or module:function.

    Raises:
        ValueError: TRL does not know a field, a value has the wrong type, or the config has no equivalent recipe.
    """
    if processes < 1:
        raise ValueError(f"--processes is {processes}: accelerate had one or more")
    try:
        run = TrlRun(DDPOConfig.model_validate(config), processes)
    except ValidationError as error:
        raise ValueError(f"not the DDPOConfig of TRL {TRL_VERSION}: {explain(error, DDPOConfig)}") from error
    if run.images_per_step > 0 and run.images % run.images_per_step:
        raise ValueError(
            f"sample_batch_size × sample_num_batches_per_epoch × processes = {run.images} images a round, which "
            f"train_batch_size × train_gradient_accumulation_steps × processes = {run.images_per_step} does not divide"
        )
    tables = _frame(run, model, reward)
    for field, counterpart in COUNTERPARTS.items():
        value = counterpart.value_of(field, run)
        if value is not None:
            _put(tables, counterpart.key, value)
    tables = {key: value for key, value in tables.items() if value not in ({}, [])}
    _refuse_impossible(tables)
    head = [f"From the DDPOConfig of TRL {TRL_VERSION}.", *_layout_note(run, model), NOT_IN_A_CONFIG]
    return Migrated(tables, [*head, *_notes(run)])


def read_config(path: Path) -> dict[str, Any]:
    """Read a DDPOConfig's fields from JSON, also as its `to_dict` flattens them.

    Raise ValueError if there is no object.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give the path of a JSON object with the fields of a DDPOConfig")
    try:
        flat = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(flat, dict):
        raise ValueError(f"{path} holds a {type(flat).__name__}: it must be an object with the fields of a DDPOConfig")
    config: dict[str, Any] = {}
    for key, value in flat.items():
        _put(config, key.replace("/", "."), value)
    return config


def write_recipe(path: Path, migrated: Migrated) -> Path:
    """Write the recipe and return its path. Raise ValueError if the file exists."""
    if path.exists():
        raise ValueError(f"--output is {path}, which exists: give the recipe a place of its own")
    path.write_text(migrated.toml, encoding="utf-8")
    return path


def _frame(run: TrlRun, model: str, reward: str) -> dict[str, Any]:
    """Return the recipe's tables in their usual order, with the settings that are not in a config."""
    tables: dict[str, Any] = {
        "policy": {"name": "stable_diffusion", "model": model, "lora": LORA},
        "prompts": {"name": "animals"},
        "sampling": {},
        "samplers": {},
        "reward": {"name": "function", "path": reward} if ":" in reward else {"name": reward},
        "reward_workers": {},
        "algorithm": {"name": "ddpo_is"},
        "learner": {"micro_batch_size": run.micro_batch_size},
    }
    if model not in EMBEDDED_MODELS:  # as many GPUs as accelerate had
        workers = run.config.max_workers if run.config.async_reward_computation else 1
        tables["samplers"] = {"num_gpus": 0.3}
        tables["reward_workers"]["num_gpus"] = int(1000 / max(workers, 1)) / 10_000
        tables["learner"]["num_gpus"] = 0.6
        if run.processes > 1:
            shared = tables["reward_workers"]["num_gpus"] * max(workers, 1)
            for table, keys in keys_of(_layout(run), shared).items():
                tables[table] |= keys
    return tables


def _layout_note(run: TrlRun, model: str) -> list[str]:
    """Name the layout of accelerate's GPUs; nothing for a model that needs none."""
    if model in EMBEDDED_MODELS:
        return []
    layout = "1 GPU for all roles" if run.processes == 1 else f"{run.processes} GPUs: {_layout(run).in_words}"
    return [f"For {layout}, as many GPUs as accelerate had. `ddpo plan RECIPE --gpus N` finds another layout."]


def _layout(run: TrlRun) -> Layout:
    """Return the fastest layout of accelerate's GPUs, with the work of a typical network.

    The network itself is not counted, because at lag 0 the fastest layout hardly depends on it.
    """
    config = run.config
    load = RoundLoad(
        tasks=max(1, config.sample_num_batches_per_epoch * run.processes),  # what is impossible is refused later
        sample=float(config.sample_batch_size * config.sample_num_steps),
        learn=run.images * run.trained_steps * config.train_num_inner_epochs * ASSUMED_BOTH,
        images_per_step=max(1, run.images_per_step),
        transitions_per_image=run.trained_steps,
        micro_batch_size=run.micro_batch_size,
    )
    return best(load, run.processes)


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tables = tables.setdefault(section, {})
        if not isinstance(tables, dict):
            raise ValueError(f"{section} is {tables!r}, and {key} would lie inside it")
    tables[last] = value


def _refuse_impossible(tables: dict[str, Any]) -> None:
    """Raise ValueError if the tables are no valid recipe, and name the fields that the wrong keys come from."""
    try:
        build_components(Recipe.parse(tables))
    except ValueError as error:
        keys = set(re.findall(r"(?:^|[:;] )([\w.]+) is ", str(error)))
        fields = [
            f"{part.key} comes from {field}"
            for field, part in COUNTERPARTS.items()
            if part.key and any(f"{key}.".startswith(f"{part.key}.") for key in keys)
        ]
        raise ValueError("; ".join([str(error), *fields])) from error


def _notes(run: TrlRun) -> list[str]:
    """List every field once: unchanged, with a difference, without a counterpart, or with nothing to carry over."""
    same, other, none, nothing = [], [], [], []
    for field, counterpart in COUNTERPARTS.items():
        carried = counterpart.value_of(field, run) is not None
        says = "" if counterpart.quiet(run) else counterpart.says.format(run=run, config=run.config)
        if carried and says:
            other.append(f"- {field} → {counterpart.key}: {says}.")
        elif carried:
            same.append(f"{field} → {counterpart.key}")
        elif says:
            none.append(f"- {field}: {says}.")
        else:
            nothing.append(field)
    return [
        f"Carried over as they stand: {', '.join(same)}.",
        *(["Carried over with a difference:", *other] if other else []),
        *(["Without a counterpart:", *none] if none else []),
        f"Nothing to carry over: {', '.join(nothing)}.",
    ]

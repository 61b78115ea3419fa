"""ddpo config: type, default, bounds and meaning of every key of a recipe; the page and the JSON schema made from them.

`python -m ray_ddpo.deploy.commands.config` prints docs/configuration.md (`--page`) or recipe.schema.json (`--schema`).
"""

import argparse
import difflib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ray_ddpo.common.recipe.bounds import LARGEST
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component, Registry, component_class, import_object, models_in
from ray_ddpo.common.recipe.shipped import described_recipes
from ray_ddpo.deploy.driver.registries import REGISTRIES

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}  # as TOML and JSON schema call them
COMPONENTS = ("policy", "prompts", "reward", "algorithm", "trackers")  # sections that name a component
ALIKE = {"rewards": "reward", "evaluation.scorers": "reward"}  # lists of tables that have another section's keys
RECIPES = "recipes"  # in the place of a section: the shipped recipes
NONE = "–"  # default of a key that need not be given
DRAFT = "http://json-schema.org/draft-07/schema#"  # the version of JSON schema that editors' TOML plugins read
SIGNS = {
    annotated_types.Ge: "≥ {0.ge:,}",
    annotated_types.Gt: "> {0.gt:,}",
    annotated_types.Le: "≤ {0.le:,}",
    annotated_types.Lt: "< {0.lt:,}",
    annotated_types.MultipleOf: "multiple of {0.multiple_of}",
    annotated_types.MinLen: "at least {0.min_length} long",
    annotated_types.MaxLen: "at most {0.max_length} long",
}  # of a bound

PAGE_HEAD = f"""# Configuration

Look up any key of a recipe here: its type, default, bounds and meaning. `ddpo config SECTION` prints the same.

This page is generated from the code by `make configuration`. In a recipe, `[section]` is a TOML table. On the
command line, `--section.key VALUE` overrides a key. A number without an upper bound may be up to {LARGEST:,}.

An editor with a TOML plugin (taplo, Even Better TOML) completes and checks keys in a recipe that begins with

```toml
#:schema deploy/recipes/recipe.schema.json
```
"""
SEVERAL_REWARDS = (
    "Several rewards are a list `[[rewards]]` of such tables, and scorers a list `[[evaluation.scorers]]`.\n"
)


@dataclass(frozen=True)
class Key:
    """Key of a section, in words."""

    name: str  # dotted, inside its section
    type: str
    default: str
    bounds: str
    meaning: str


@cache
def sections() -> dict[str, type[BaseModel]]:
    """Return the tables of a recipe by the name of their section."""
    fields = Recipe.model_fields
    found = {name: model for name, field in fields.items() for model in models_in(field.annotation)}
    return {name: model for name, model in found.items() if name not in ALIKE}


def registry_of(section: str) -> Registry | None:
    """Return the registry whose components a section names, or None if it names none."""
    name = REGISTRIES.get(sections()[ALIKE.get(section, section)].__name__)
    return import_object(name, "registry") if name else None


def config(section: str | None) -> str:
    """Describe the keys of a section in words.

    Args:
        section: such as `sampling`; with a component, such as `algorithm.grpo`. `recipes`: a list of those that ship.
            None: an overview of all sections.

    Raises:
        ValueError: There is no such section or component.
    """
    if section is None:
        return _overview()
    if section == RECIPES:
        return "\n".join([*described_recipes(), "", "`ddpo train NAME` runs one, `ddpo plan NAME` says what it needs."])
    table, _, component = section.partition(".")
    table = ALIKE.get(section, ALIKE.get(table, table))
    if table not in sections():
        near = difflib.get_close_matches(table, sections(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no section {table!r} in a recipe: it must be one of {', '.join(sections())}{hint}")
    registry = registry_of(table)
    if not component or section in ALIKE:
        lines = [f"[{table}]  {inspect.getdoc(sections()[table])}", "", *_in_words(sections()[table])]
        if registry:
            names = f"Components: {', '.join(registry)}"
            lines += ["", names, f"`ddpo config {table}.NAME` prints the keys of one."]
        return "\n".join(lines)
    if registry is None:
        raise ValueError(f"section {table!r} names no component: those that do are {', '.join(COMPONENTS)}")
    owners = _owners(registry, table, component)
    if component not in registry and owners:
        raise ValueError(
            f"{section} is a key of components and not a component: `ddpo config {table}.{owners[0]}` prints it"
            + (f", as it does for {', '.join(owners[1:])}" if owners[1:] else "")
        )
    cls = component_class(registry, component, table, Component)
    keys = _in_words(cls) or ["It has no keys of its own."]
    return "\n".join([f'[{table}] name = "{component}"  {inspect.getdoc(cls)}', "", *keys])


def _owners(registry: Registry, table: str, key: str) -> list[str]:
    """Return the components that have a key, or a table, of this name."""
    first = key.partition(".")[0]
    return [name for name in registry if first in component_class(registry, name, table, Component).model_fields]


def _in_words(model: type[BaseModel]) -> list[str]:
    """Return each key of a table or component as two lines for the terminal."""
    lines = []
    for key in keys_of(model):
        default = {"required": "required", NONE: "optional"}.get(key.default, f"default {key.default}")
        facts = ", ".join(filter(None, (key.type, default, key.bounds)))
        lines += [f"{key.name}  ({facts})", f"    {key.meaning}"]
    return lines


def _overview() -> str:
    """Return the top-level keys in full, and each section with its description."""
    width = max(map(len, sections()))
    docs = {name: (inspect.getdoc(model) or "").partition("\n")[0] for name, model in sections().items()}
    lines = [f"{name:<{width}}  {doc}" for name, doc in docs.items()]
    closing = (
        "`ddpo config SECTION` prints the keys of a section, `ddpo config algorithm.grpo` those of a component, and "
        "`ddpo config recipes` a list of the shipped recipes."
    )
    return "\n".join(["Keys above all sections:", "", *_in_words(Recipe), "", "Sections:", "", *lines, "", closing])


def keys_of(model: type[BaseModel], given: BaseModel | None = None, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a table or component, those of tables inside it with a dotted name.

    Args:
        model: the table's class.
        given: an instance whose values are the defaults. None: the defaults of the class.
        prefix: section and dot in front of the names.
    """
    for name, field in model.model_fields.items():
        default = getattr(given, name) if given is not None else field.default
        inner = next(models_in(field.annotation), None)
        if inner is not None and model is Recipe:
            continue  # a section of its own
        if inner is not None and get_origin(field.annotation) is not tuple:
            yield from keys_of(inner, default if isinstance(default, BaseModel) else None, f"{prefix}{name}.")
            continue
        required = field.is_required() and given is None
        meaning = " ".join((field.description or "").split())
        yield Key(
            prefix + name,
            type_in_words(field.annotation),
            "required" if required else _toml(default),
            _bounds(field),
            meaning,
        )


def type_in_words(annotation: Any) -> str:
    """Return a key's type in TOML's words, such as `integer | "auto"` or `list of string`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_in_words(arguments[0])
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in arguments)
    if origin in (Union, UnionType):
        return " | ".join(type_in_words(inner) for inner in arguments if inner is not type(None))
    if origin is tuple:
        return f"list of {type_in_words(arguments[0])}"
    if origin is dict:
        return "table" if arguments[1] not in TYPES else f"table of {type_in_words(arguments[1])}"
    return TYPES.get(annotation, "table")


def _toml(value: Any) -> str:
    """Return a default as a recipe has it; a dash if the key has no value by default."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) else f"{value:.1f}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _bounds(field: FieldInfo) -> str:
    """Return the bounds of a key in signs and words; empty if its type says all."""
    inner = [part for part in get_args(field.annotation) if get_origin(part) is Annotated]
    metadata = [*field.metadata, *(bound for part in inner for info in get_args(part)[1:] for bound in info.metadata)]
    said = [SIGNS[type(bound)].format(bound) for bound in metadata if type(bound) in SIGNS]
    patterns = [f"matches {bound.pattern}" for bound in metadata if getattr(bound, "pattern", None)]
    return ", ".join([*said, *patterns]).replace(f"{2**63:,}", "2^63")


def page() -> str:
    """Return docs/configuration.md."""
    parts = [PAGE_HEAD, "## Keys above all sections\n", *_markdown(Recipe)]
    for section, model in sections().items():
        heading = f"[[{section}]]" if section == "trackers" else f"[{section}]"
        parts += [f"## {heading}\n", f"{inspect.getdoc(model)}\n", *_markdown(model)]
        if section == "reward":
            parts.append(SEVERAL_REWARDS)
        registry = registry_of(section) or {}
        for name in registry:
            cls = component_class(registry, name, section)
            parts += [f"### {section}: {name}\n", f"{inspect.getdoc(cls)}\n", *_markdown(cls)]
    return "\n".join(parts)


def _markdown(model: type[BaseModel]) -> list[str]:
    """Return a table of keys in Markdown; no lines if there are no keys."""
    rows = [
        f"| `{key.name}` | {_cell(key.type)} | {_cell(key.default)} | {_cell(key.bounds)} | {key.meaning} |"
        for key in keys_of(model)
    ]
    return ["| key | type | default | bounds | meaning |", "|---|---|---|---|---|", *rows, ""] if rows else []


def _cell(text: str) -> str:
    """Return text as a cell of a Markdown table, code if it is more than a word."""
    escaped = text.replace("|", "\\|")
    return f"`{escaped}`" if any(letter in text for letter in '"[\\') else escaped


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, in which a table with a component's name has the component's keys."""
    found = Recipe.model_json_schema()
    definitions = found["$defs"]
    for section in COMPONENTS:
        table = definitions[sections()[section].__name__]
        own = {"properties": {"name": {"pattern": ":"}}, "title": "module:Class"}
        registry = registry_of(section) or {}
        classes = {name: component_class(registry, name, section) for name in registry}
        table["anyOf"] = [*(_variant(name, cls, table, definitions) for name, cls in classes.items()), own]
    return {"$schema": DRAFT, **found}


def _variant(name: str, cls: type[Component], table: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a section that names this component; tables inside it are added to `definitions`."""
    keys = cls.model_json_schema()
    definitions |= keys.get("$defs", {})
    properties = {**table["properties"], **keys.get("properties", {}), "name": {"const": name}}
    told = {"title": name, "description": keys.get("description", ""), "properties": properties}
    return {**told, "required": keys.get("required", []), "additionalProperties": False}


def main() -> None:
    """Print the page or the schema."""
    parser = argparse.ArgumentParser(description="Print the generated configuration page or JSON schema.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--page", action="store_true")
    what.add_argument("--schema", action="store_true")
    is_page = parser.parse_args().page
    print(page() if is_page else json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", end="")


if __name__ == "__main__":
    main()

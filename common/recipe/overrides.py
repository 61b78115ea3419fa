"""Overrides: `--section.key value`, applied to a recipe's tables (imports torch only for a component's keys)."""

import tomllib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError

from ray_ddpo.common.recipe.allowed_values import models_in
from ray_ddpo.common.recipe.registry import import_object
from ray_ddpo.common.recipe.tables import ComponentTable

# From the class of a recipe's table to `module:REGISTRY` with the components that it can name. The program fills it.
REGISTRIES: dict[str, str] = {}


# Not pydantic-settings: its command line knows only declared fields, and a component's table has the component's keys.
def with_overrides(
    tables: dict[str, Any], overrides: list[str], model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Return `tables` with overrides such as `["--rounds", "6", "--learner.learning_rate", "1e-3"]`.

    A value is read as TOML if the key's type in `model` accepts that, else as text: `--name true` is the text "true".
    A component's keys have the types of the class that its table names. A key of unknown type takes any TOML value.

    Args:
        tables: as TOML gives them.
        overrides: pairs of `--section.key` and value.
        model: the recipe's class. None: all types are unknown.

    Raises:
        ValueError: The overrides are no pairs, or a section is no table.
    """
    if len(overrides) % 2 or any(not key.startswith("--") for key in overrides[::2]):
        raise ValueError(f"overrides are pairs of --section.key and VALUE, and these are {overrides}")
    pairs = [
        (option.removeprefix("--").split("."), text)
        for option, text in zip(overrides[::2], overrides[1::2], strict=True)
    ]
    result, laid = tables, tables
    for path, text in pairs:
        laid = _with_value(laid, path[:-1], path[-1], _toml_value(text))
    for path, text in pairs:  # `laid` has every override, so a component's name may come after its keys
        value = _toml_value(text)
        if model and not isinstance(value, str):
            value = _as_accepted(value, text, list(_types_of_key(model, laid, path)))
        result = _with_value(result, path[:-1], path[-1], value)
    return result


def _as_accepted(value: Any, text: str, types: list[Any]) -> Any:
    """Return the value that one of the key's types accepts: `value`, else `text`. If neither fits, return `value`."""
    for candidate in (value, text):
        for kind in types:
            with suppress(ValidationError, PydanticUserError):  # the latter: a type that pydantic does not check
                TypeAdapter(kind).validate_python(candidate)
                return candidate
    return value


def _types_of_key(annotation: Any, value: Any, path: list[str]) -> Iterator[Any]:
    """Yield the types that the key at `path` may have, in tables of this type and content."""
    if not path:
        yield annotation
        return
    key, rest = path[0], path[1:]
    if isinstance(value, list):
        inside = value[int(key)] if key.isdigit() and int(key) < len(value) else {}
        yield from _types_of_key(annotation, inside, rest) if rest else ()
        return
    inside = value.get(key, {}) if isinstance(value, dict) else {}
    for model in models_in(annotation):
        fields = model.model_fields
        if issubclass(model, ComponentTable) and key not in fields and isinstance(value, dict):
            fields = _component_fields(model, value.get("name"))
        if key in fields:
            yield from _types_of_key(fields[key].annotation, inside, rest)


def _component_fields(table: type[ComponentTable], name: Any) -> dict[str, Any]:
    """Return the fields of the component that a table names; none if importing it fails, which building it reports."""
    if not isinstance(name, str):
        return {}
    registry = import_object(REGISTRIES[table.__name__], "registry") if table.__name__ in REGISTRIES else {}
    try:
        component = import_object(registry.get(name, name), "name")
    except ValueError:
        return {}
    return getattr(component, "model_fields", {})


def _with_value(tables: Any, sections: list[str], key: str, value: Any) -> Any:
    """Return a copy of `tables` with `value` at `sections` and `key`; a section that is missing is created."""
    if isinstance(tables, list):  # [[trackers]] and the like: the section is a position
        index = int(sections[0]) if sections and sections[0].isdigit() else -1
        if not 0 <= index < len(tables):
            raise ValueError(f"an override says {'.'.join([*sections, key])!r} of a list of {len(tables)} tables")
        return [*tables[:index], _with_value(tables[index], sections[1:], key, value), *tables[index + 1 :]]
    if not isinstance(tables, dict):
        raise ValueError(f"an override names the key {key!r} inside {tables!r}, which is a value and not a table")
    if not sections:
        return {**tables, key: value}
    return {**tables, sections[0]: _with_value(tables.get(sections[0], {}), sections[1:], key, value)}


def _toml_value(text: str) -> Any:
    try:
        tables = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return tables["value"] if len(tables) == 1 else text

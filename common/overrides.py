"""Overrides: `--section.key value` of the command line, laid over a recipe's tables (no torch)."""

import tomllib
from typing import Any


# Not pydantic-settings: its command line knows only declared fields, and a room's table has the chosen class's own keys.
def with_overrides(tables: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Lay `["--rounds", "6", "--learner.learning_rate", "1e-3"]` over `tables`; values are read as TOML, else as text."""
    if len(overrides) % 2 or any(not key.startswith("--") for key in overrides[::2]):
        raise ValueError(f"overrides are pairs of --section.key and VALUE, and these are {overrides}")
    result: dict[str, Any] = tables
    for option, text in zip(overrides[::2], overrides[1::2], strict=True):
        *sections, key = option.removeprefix("--").split(".")
        result = _with_value(result, sections, key, _toml_value(text))
    return result


def _with_value(tables: Any, sections: list[str], key: str, value: Any) -> Any:
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

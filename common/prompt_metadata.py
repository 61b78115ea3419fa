"""Check that a prompt's text and metadata can be stored and sent: texts that have UTF-8, and values that JSON holds."""

import math
from typing import Any

import numpy as np


def check_text(text: str, what: str) -> None:
    """Raise ValueError if a text cannot be encoded."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} {text!r} is no text that can be encoded: {error.reason}") from error


def json_value(value: Any, place: str) -> Any:
    """Return the value as JSON gives it back: tuples as lists, numpy's numbers as Python's. Else raise ValueError."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        if other := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{place} has the key {other[0]!r}: a key must be a text")
        for key in value:
            check_text(key, f"a key of {place}")
        return {key: json_value(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, f"{place}.{index}") for index, item in enumerate(value)]
    if isinstance(value, str):
        check_text(value, place)
    elif not (value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        kind = "" if isinstance(value, float) else f", of type {type(value).__name__}"
        raise ValueError(
            f"{place} is {str(value)[:40]!r}{kind}: a prompt's metadata is what JSON holds: texts, finite numbers, "
            "true, false, null, lists and objects"
        )
    return value

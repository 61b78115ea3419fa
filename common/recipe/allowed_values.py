"""Say in words which values a key may have, and gather the errors of a key of several types into one (no torch)."""

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}
BOUNDS = {Ge: ("ge", "of at least"), Gt: ("gt", "above"), Le: ("le", "of at most"), Lt: ("lt", "below")}
UNIONS = (Union, types.UnionType)


def allowed(annotation: Any, metadata: Sequence[Any] = (), several: bool = False) -> str:
    """Return the values of a type in words, such as `a whole number of at least 1, or "auto"`.

    Args:
        annotation: the type.
        metadata: the bounds of its field.
        several: in the plural.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(inner[0], [*metadata, *inner[1:]], several)
    if origin in UNIONS:
        return ", or ".join(allowed(each, metadata, several) for each in inner if each is not type(None))
    if origin is Literal:
        return ", or ".join(f'"{each}"' if isinstance(each, str) else str(each) for each in inner)
    if origin in (tuple, list):
        count = "" if origin is list or Ellipsis in inner else f"{len(inner)} "
        return f"a list of {count}{allowed(inner[0], (), several=True)}" if inner else "a list"
    if annotation in KINDS:
        return " ".join([(PLURALS if several else KINDS)[annotation], " and ".join(_bounds(metadata))]).rstrip()
    is_table = origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel))
    return ("tables" if several else "a table") if is_table else str(getattr(annotation, "__name__", annotation))


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    """Yield the bounds among a type's metadata in words."""
    for each in metadata:
        if isinstance(each, FieldInfo):
            yield from _bounds(each.metadata)
        for kind, (name, words) in BOUNDS.items():
            if isinstance(each, kind):
                yield f"{words} {getattr(each, name):g}"


def counts(annotation: Any) -> bool:
    """Return whether a type has numbers and no booleans among its values or in its lists."""
    found = set(_leaves(annotation))
    return bool(found & {int, float}) and bool not in found and Any not in found


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types that a type's values and the elements of its lists may have."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _leaves(inner[0])
    elif origin in (*UNIONS, tuple, list):
        for each in inner:
            yield from _leaves(each)
    else:
        yield annotation


def one_error_per_key(errors: Sequence[ErrorDetails], model: type[BaseModel]) -> list[ErrorDetails]:
    """Merge the errors of a key that may have several types: pydantic reports one for each, with the type in its place."""
    found: dict[tuple[int | str, ...], ErrorDetails] = {}
    for fault in errors:
        place, annotation = _key(model, fault["loc"])
        if place == fault["loc"] or annotation is None:
            found[(*fault["loc"], len(found))] = fault
        elif place not in found or len(fault["loc"]) <= len(place) + 1:  # another one is about an element of a list
            found[place] = {**fault, "type": "union", "loc": place, "msg": f"it must be {allowed(annotation)}"}
    return list(found.values())


def _key(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """Return the part of an error's place that names a key, and the key's type if that is a union that ends it."""
    annotation: Any = model
    for number, part in enumerate(loc):
        fields = next((each.model_fields for each in models_in(annotation) if part in each.model_fields), None)
        if fields is not None and isinstance(part, str):
            annotation = fields[part].annotation
        elif _has_several_types(annotation):
            return loc[:number], annotation
    return loc, None


def _has_several_types(annotation: Any) -> bool:
    types_beside_none = [each for each in get_args(annotation) if each is not type(None)]
    return get_origin(annotation) in UNIONS and len(types_beside_none) > 1


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in a type, such as the one in `tuple[Model, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)

"""Check types and shapes of each call while tests run, at less cost than jaxtyping's own decorator."""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, ForwardRef, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

OWN = jaxtyping.jaxtyped
CHECKED = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def jaxtyped(fn: Any, typechecker: Callable) -> Any:
    """Decorate a function as jaxtyping does: names of axes are bound during a call, if it has any.

    jaxtyping's own decorator checks arguments twice and binds them in Python, a sixth of the time of all tests. It
    stays for classes, for generators, whose values come after the call, and for axes that name an argument's value.
    """
    if not isinstance(fn, FunctionType) or inspect.isgeneratorfunction(fn) or inspect.iscoroutinefunction(fn):
        return OWN(fn, typechecker=typechecker)
    written = fn.__annotations__
    annotations = {name: resolved(each, fn.__globals__) for name, each in written.items()}
    shapes = [shape for each in annotations.values() for shape in shapes_of(each)]
    if any("{" in shape for shape in shapes):
        return OWN(fn, typechecker=typechecker)
    fn.__annotations__ = annotations
    checked = CHECKED(fn)
    checked.__annotations__ = fn.__annotations__ = written
    if not shapes:
        return checked

    @functools.wraps(fn)
    def bound(*args: Any, **kwargs: Any) -> Any:
        with OWN("context"):
            return checked(*args, **kwargs)

    return bound


def shapes_of(annotation: Any) -> list[str]:
    """Return the shapes of jaxtyping's arrays in an annotation, as they are written."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return [annotation.dim_str]
    return [shape for each in get_args(annotation) for shape in shapes_of(each)]


def resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """Return an annotation without quoted names. Anything is allowed where one has no value yet."""
    if not is_quoted(annotation):
        return annotation

    def takes(value: annotation) -> None: ...

    try:
        return get_type_hints(takes, names, include_extras=True)["value"]
    except NameError:
        return Any


def is_quoted(annotation: Any) -> bool:
    return isinstance(annotation, str | ForwardRef) or any(is_quoted(each) for each in get_args(annotation))


def install() -> None:
    """Use this decorator in the packages of --jaxtyping-packages that are imported from now on."""

    def decorator(fn: Any = None, *, typechecker: Callable) -> Any:
        return functools.partial(jaxtyped, typechecker=typechecker) if fn is None else jaxtyped(fn, typechecker)

    jaxtyping.jaxtyped = decorator

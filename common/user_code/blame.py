"""Name who failed: an error of a user's own component becomes one line with class, method, file and line (no torch)."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray_ddpo.common.user_code.frames import place_in_users_code

if TYPE_CHECKING:
    from ray_ddpo.common.recipe.registry import Component, Registry

MOST_LETTERS = 300  # of another library's message


def is_users_own(component: "Component", registry: "Registry") -> bool:
    """Return whether a component was written outside the project: its class is none of the registry's."""
    return f"{type(component).__module__}:{type(component).__qualname__}" not in registry.values()


def call_if_own(component: "Component", registry: "Registry", method: str, *arguments: Any) -> Any:
    """Call a method: as `call` does if the component is the user's own, else directly."""
    if is_users_own(component, registry):
        return call(component, method, *arguments)
    return getattr(component, method)(*arguments)


@contextmanager
def converting_errors(converted: Callable[[BaseException], BaseException]) -> Iterator[None]:
    """Run code in the body that may be a user's, and so may raise anything, even SystemExit.

    Args:
        converted: returns the error to raise in place of the body's error. If it is the same error, that passes
            unchanged, as an interrupt does.
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        other = converted(error)
        if other is error:
            raise
        raise other from error


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turn an error of a user's code into a ValueError of one line that begins with `what`. Memory errors pass unchanged."""

    def converted(error: BaseException) -> BaseException:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return error
        place = place_in_users_code(error)
        kind = "" if type(error) is ValueError else f" {type(error).__name__}"
        where = f" ({place})" if place else ""
        return ValueError(f"{what} raised{kind}: {_flat(str(error))}{where}")

    with converting_errors(converted):
        yield


def call(owner: Any, method: str, *arguments: Any) -> Any:
    """Call a method of a user's component.

    Raises:
        ValueError: the method is missing, takes other arguments, or raises an error of its own.
    """
    name, function = f"{type(owner).__name__}.{method}", getattr(owner, method, None)
    if not callable(function):
        raise ValueError(f"{name} is missing, or is no method: a {_contract(owner)} needs it")
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments)
    except TypeError:
        raise ValueError(f"{name} takes {signature}: it is called with {_expected(owner, method, arguments)}") from None
    with blamed(name):
        return function(*arguments)


def _expected(owner: Any, method: str, arguments: tuple[Any, ...]) -> str:
    """Return the arguments' names as the project's own class has them; else how many there are."""
    base = next((cls for cls in type(owner).__mro__[1:] if method in vars(cls)), None)
    if base is None:
        return f"{len(arguments)} arguments"
    names = list(inspect.signature(getattr(base, method)).parameters)
    return f"({', '.join(names[1 : len(arguments) + 1])})"


def _contract(owner: Any) -> str:
    """Return the name of the nearest class of the project that a user's class is derived from."""
    return next((cls.__name__ for cls in type(owner).__mro__ if cls.__module__.startswith("ray_ddpo.")), "component")


def _flat(message: str) -> str:
    flat = " ".join(message.split())
    return flat if len(flat) <= MOST_LETTERS else f"{flat[:MOST_LETTERS]}…"

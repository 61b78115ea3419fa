"""Registries: from a recipe's table to a component, a frozen and checked object that is its own configuration."""

import difflib
import importlib
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError

from ray_ddpo.common.recipe.allowed_values import models_in, one_error_per_key
from ray_ddpo.common.recipe.bounds import Bounded
from ray_ddpo.common.recipe.renamed import renamed_key, renamed_value
from ray_ddpo.common.user_code.blame import blamed
from ray_ddpo.common.user_code.by_value import is_by_value, reference, source_of
from ray_ddpo.common.user_code.sources import is_of_the_project

Registry = dict[str, str]  # name in a recipe -> "module:Class"


class Component(Bounded):
    """Component of a registry. Its fields are its hyperparameters. It is pickled to the process that `load`s it."""

    required_packages: ClassVar[tuple[str, ...]] = ()
    """Modules of packages that the project does not install by itself. A run refuses to start if one is missing."""

    def user_modules(self) -> dict[str, str]:
        """Return the modules outside the project that this component runs, by the key that names them."""
        own = type(self).__module__
        return {} if is_of_the_project(own) else {"name": own}

    def user_texts(self) -> dict[str, str]:
        """Return the source code that no module holds and that this component runs, by the key that names it."""
        return {"name": source_of(type(self))} if is_by_value(reference(type(self))) else {}


ComponentT = TypeVar("ComponentT", bound=Component)


def import_object(path: str, what: str) -> Any:
    """Import `module:attribute`.

    Args:
        path: what to import.
        what: the recipe's key, for the errors.

    Raises:
        ValueError: The path has another form, the module cannot be imported, or it lacks the attribute.
    """
    module_name, separator, attribute = path.partition(":")
    if not separator or not module_name or not attribute:
        raise ValueError(f"{what} is {path!r}: it must have the form module:name")
    try:
        with blamed(f"{what} is {path!r}: importing it"):
            module = importlib.import_module(module_name)
    except ValueError as error:
        cause = error.__cause__
        # Only if the module itself or a package around it is missing. Otherwise something that it imports is missing.
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(f"{cause.name}."):
            raise ValueError(f"{what} is {path!r}: there is no module {cause.name!r} to import") from cause
        raise
    if not hasattr(module, attribute):
        raise ValueError(f"{what} is {path!r}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def component_class(registry: Registry, name: str, what: str, kind: type[Component] | None = None) -> type[Component]:
    """Return the class that a recipe names.

    Args:
        registry: the known names.
        name: one of them or, if `kind` is given, `module:Class`.
        what: the table's name, for the errors.
        kind: the abstract class that a class from outside the registry must be derived from. None: only the registry's.

    Raises:
        ValueError: The name stands for no such class.
    """
    if name in registry:
        return import_object(registry[name], f"{what}.name")
    if kind is None or ":" not in name:
        own = f", or module:Class with a {kind.__name__} of your own" if kind else ""
        raise ValueError(f"{what}.name is {name!r}: it must be one of {sorted(registry)}{own}")
    if is_by_value(name):
        raise ValueError(
            f"{what}.name is {name!r}: an object of this class was handed over by a Python program, and no module holds the "
            f"class: hand it over again ({what.partition('.')[0]}=…), or move the class into a module and name it module:Class"
        )
    cls = import_object(name, f"{what}.name")
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise ValueError(f"{what}.name is {name!r}: it must be derived from {kind.__name__} in {kind.__module__}")
    if lacking := sorted(getattr(cls, "__abstractmethods__", ())):
        raise ValueError(f"{what}.name is {name!r}: it lacks {lacking}")
    return cls


def build(registry: Registry, table: dict[str, Any], what: str, kind: type[Component] | None = None) -> Any:
    """Build the component that `table` names from its other keys. `what` and `kind` are as in `component_class`.

    Raises:
        ValueError: The name stands for no such class, or a key is unknown, of the wrong type or out of range.
    """
    keys = {key: value for key, value in table.items() if key != "name"}
    cls = component_class(registry, table["name"], what, kind)
    try:
        return cls(**keys)
    except ValidationError as error:
        raise ValueError(explain(error, cls, f"{what}.")) from error


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Return one line for pydantic's errors about `model`: for each the key, its value, and what is allowed."""
    lines = []
    for fault in one_error_per_key(error.errors(), model):
        place, message = fault["loc"], fault["msg"].removeprefix("Value error, ")
        key, value = prefix + ".".join(str(part) for part in place), fault["input"]
        unknown = fault["type"] == "extra_forbidden"
        if renamed := renamed_key(key, value) if unknown else renamed_value(key, value):
            lines.append(renamed)
        elif unknown:
            known = _keys_at(model, place[:-1])
            near = difflib.get_close_matches(str(place[-1]), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{key} is not a key that is known: the keys here are {known}{hint}")
        elif fault["type"] == "missing":
            lines.append(f"{key} is missing")
        elif fault["type"] == "value_error" and not place:
            lines.append(f"{prefix}{message}")
        elif fault["type"] in ("model_type", "dict_type"):
            lines.append(f"{key} is {value!r}: it must be a table, [{key}] and its keys below")
        else:
            lines.append(f"{key} is {value!r}: {message[0].lower() + message[1:]}")
    return "; ".join(lines)


def _keys_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the table at `place` inside `model`; numbers are positions in a list of tables."""
    for part in place:
        if isinstance(part, str):
            model = next(models_in(model.model_fields[part].annotation))
    name = ["name"] if issubclass(model, Component) else []
    return sorted([*name, *model.model_fields])

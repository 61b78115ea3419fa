"""RoleActor: the Ray actor around a role's object. It always starts, and reports why the role itself cannot."""

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from ray_ddpo.common.recipe.registry import import_object
from ray_ddpo.common.role_loading import RoleNotStarted, starting
from ray_ddpo.deploy.driver.role_output import label_output


@dataclass(frozen=True)
class RoleSetting:
    """Settings that a process needs before it imports anything of a role."""

    label: str  # role and number, shown on the terminal
    role: str  # the role in words, for errors
    path: str  # module:class of the role
    sees_gpus: bool


class RoleActor:
    """An actor that constructs a role's object and forwards calls to it.

    The constructor does not raise, so that Ray neither restarts the actor nor prints a traceback. `ready` returns the
    error. Arguments come as references, so that their imports happen after output and GPU visibility are set up.
    """

    def __init__(self, setting: RoleSetting, arguments: list[Any]) -> None:
        if not setting.sees_gpus:  # Ray 2.60 shows all GPUs of the node to an actor that asks for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        log_file = label_output(setting.label)
        self._called = f"{type(self).__name__} {setting.label}"
        self._object: Any = None
        self._failure: str | None = None
        try:
            with starting(setting.role):
                given = [argument for part in ray.get(arguments) for argument in part]
                self._object = import_object(setting.path, "role")(*given)
        except RoleNotStarted as failure:
            self._failure = str(failure)
            traceback.print_exception(failure.__cause__, file=log_file)
            log_file.flush()

    def __repr__(self) -> str:
        """Return the text for the dashboard's page of actors."""
        return self._called if self._object is None else repr(self._object)

    def ready(self) -> Any:
        """Return a RoleNotStarted if the role could not start, else the role's own answer."""
        return self._object.ready() if self._failure is None else RoleNotStarted(self._failure)


def role_actor(cls: type) -> type:
    """Return a role's actor class, with the methods of `cls`; unpickling it does not import the role's module."""
    methods = [name for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name))]
    passed_on = {name: _passed_on(name) for name in methods if not hasattr(RoleActor, name)}
    return type(cls.__name__, (RoleActor,), passed_on)


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: RoleActor, *arguments: Any, **named: Any) -> Any:
        return getattr(self._object, name)(*arguments, **named)

    method.__name__ = name
    return method

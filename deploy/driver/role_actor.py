"""RoleActor: the Ray actor around a role's object. It always comes up, and answers why the role itself cannot start."""

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
    """What a process must know before it imports anything of a role's."""

    label: str  # role and number, as the terminal shows it
    role: str  # in words, as an error names it
    path: str  # module:class of the role
    sees_gpus: bool


class RoleActor:
    """Constructs a role's object and passes calls on to it.

    Ray restarts nothing here and shows no trace of its own, because this constructor does not raise: `ready` answers with
    the error. Arguments come as references, so that whatever they import is imported when output and GPUs are settled.
    """

    def __init__(self, setting: RoleSetting, arguments: list[Any]) -> None:
        if not setting.sees_gpus:  # Ray 2.60 leaves all GPUs of the node visible to who asks for none
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
        """As the dashboard's page of actors has it, beside run, role and number."""
        return self._called if self._object is None else repr(self._object)

    def ready(self) -> Any:
        """Return why the role could not start, a RoleNotStarted; if it has, what the role itself answers."""
        return self._object.ready() if self._failure is None else RoleNotStarted(self._failure)


def role_actor(cls: type) -> type:
    """Return the class of a role's actor. It has the name and the methods of `cls`, and imports nothing of it to be made."""
    methods = [name for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name))]
    passed_on = {name: _passed_on(name) for name in methods if not hasattr(RoleActor, name)}
    return type(cls.__name__, (RoleActor,), passed_on)


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: RoleActor, *arguments: Any, **named: Any) -> Any:
        return getattr(self._object, name)(*arguments, **named)

    method.__name__ = name
    return method

"""From a recipe's table to a checked component, and the message for each mistake."""

import pickle
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from ray_ddpo.common.recipe.registry import Component, build, explain, import_object

Steps = Annotated[int, Field(ge=1)]


class Inner(BaseModel, extra="forbid"):
    rank: int = Field(default=4, ge=1)


class Cooked(Component):
    clip_range: float = Field(default=1e-4, gt=0)
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    steps: Steps | tuple[Steps, Steps] | None = None
    weights: tuple[float, ...] | Literal["noise", "flat"] = ()
    switch: bool | Literal["auto"] = "auto"
    most: int = Field(default=3, ge=1, le=9)


class Plain(Component):
    """A component without keys."""


# What an importable module would hold; the tests' own is imported by its file.
PLACE = "cooked_for_tests"
REGISTRY = {"cooked": f"{PLACE}:Cooked", "plain": f"{PLACE}:Plain", "lost": f"{PLACE}:Lost"}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PLACE, sys.modules[__name__])


def test_the_other_keys_of_a_table_are_the_fields_of_the_class_it_names() -> None:
    entry = build(REGISTRY, {"name": "cooked", "clip_range": 2e-4, "inner": {"rank": 8}}, "algorithm")
    assert isinstance(entry, Cooked) and entry.clip_range == 2e-4 and entry.inner.rank == 8


def test_an_entry_cannot_be_changed_and_travels_in_bytes() -> None:
    entry = build(
        {"jpeg": "ray_ddpo.actors.rewards.function:FunctionReward"}, {"name": "jpeg", "path": "a:b"}, "reward"
    )
    with pytest.raises(ValidationError, match="frozen"):
        entry.path = "c:d"
    assert pickle.loads(pickle.dumps(entry)) == entry


def test_building_leaves_the_table_unchanged() -> None:
    table = {"name": "cooked", "clip_range": 2e-4}
    build(REGISTRY, table, "algorithm")
    assert table == {"name": "cooked", "clip_range": 2e-4}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"clip_rang": 1},
            "algorithm.clip_rang is not a key that is known: the keys here are ['clip_range', 'inner', 'inners', 'most', 'name'",
        ),
        ({"clip_range": 0}, "algorithm.clip_range is 0: input should be greater than 0"),
        ({"clip_range": float("inf")}, "algorithm.clip_range is inf: input should be a finite number"),
        ({"clip_range": "wide"}, "algorithm.clip_range is 'wide': input should be a valid number, unable to parse"),
        ({"inner": {"rank": 0}}, "algorithm.inner.rank is 0: input should be greater than or equal to 1"),
        ({"inner": {"rang": 2}}, "algorithm.inner.rang is not a key that is known: the keys here are ['rank']"),
        ({"inners": [{}, {"x": 2}]}, "algorithm.inners.1.x is not a key that is known: the keys here are ['rank']"),
    ],
)
def test_an_error_names_the_key_its_value_and_what_is_allowed(keys: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build(REGISTRY, {"name": "cooked", **keys}, "algorithm")
    assert str(error.value).startswith(message)


STEPS = "a whole number of at least 1, or a list of 2 whole numbers of at least 1"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 0}, 'algorithm.size is 0: it must be a whole number of at least 1, or "auto"'),
        ({"size": "big"}, "algorithm.size is 'big': it must be a whole number of at least 1, or \"auto\""),
        ({"steps": 0}, f"algorithm.steps is 0: it must be {STEPS}"),
        ({"steps": [1]}, f"algorithm.steps is [1]: it must be {STEPS}"),
        ({"steps": [0, 2]}, f"algorithm.steps is [0, 2]: it must be {STEPS}"),
        ({"steps": True}, f"algorithm.steps is True: it must be {STEPS}"),
        ({"steps": [True, 2]}, f"algorithm.steps is [True, 2]: it must be {STEPS}"),
        ({"weights": "no"}, 'algorithm.weights is \'no\': it must be a list of numbers, or "noise", or "flat"'),
        ({"weights": [1, "x"]}, 'algorithm.weights is [1, \'x\']: it must be a list of numbers, or "noise", or "flat"'),
        ({"switch": 7}, 'algorithm.switch is 7: it must be true or false, or "auto"'),
        ({"most": True}, "algorithm.most is True: it must be a whole number of at least 1 and of at most 9"),
    ],
)
def test_a_key_of_several_types_has_one_error_with_its_own_name(keys: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build(REGISTRY, {"name": "cooked", **keys}, "algorithm")
    assert str(error.value) == message
    assert build(REGISTRY, {"name": "cooked", "switch": True, "steps": [1, 2]}, "algorithm").switch is True


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.clip_range is -1.*; algorithm\.inner\.rank is 0"):
        build(REGISTRY, {"name": "cooked", "clip_range": -1, "inner": {"rank": 0}}, "algorithm")


def test_a_component_without_keys_has_only_its_name() -> None:
    with pytest.raises(ValueError, match=r"reward\.x is not a key that is known: the keys here are \['name'\]"):
        build(REGISTRY, {"name": "plain", "x": 1}, "reward")


def test_a_missing_key_is_named() -> None:
    class Needy(BaseModel):
        path: str

    with pytest.raises(ValidationError) as error:
        Needy.model_validate({})
    assert explain(error.value, Needy, "prompts.") == "prompts.path is missing"


def test_an_unknown_name_is_answered_with_the_registrys_names() -> None:
    with pytest.raises(ValueError, match=r"reward.name is 'rwa': it must be one of \['cooked', 'lost', 'plain'\]"):
        build(REGISTRY, {"name": "rwa"}, "reward")


class Raw(Component, ABC):
    """The base class of a kind of component."""

    @abstractmethod
    def cook(self) -> None: ...


class Fried(Raw):
    heat: int = 3

    def cook(self) -> None: ...


def test_a_class_outside_the_registry_is_named_by_its_module() -> None:
    assert build(REGISTRY, {"name": f"{PLACE}:Fried", "heat": 4}, "policy", Raw) == Fried(heat=4)
    with pytest.raises(ValueError, match=r"policy.heat is 'x': input should be a valid integer"):
        build(REGISTRY, {"name": f"{PLACE}:Fried", "heat": "x"}, "policy", Raw)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fried", "it must be one of ['cooked', 'lost', 'plain'], or module:Class with a Raw of your own"),
        ("no_such_module:Fried", "there is no module 'no_such_module' to import"),
        (f"{PLACE}:Boiled", f"module '{PLACE}' has no 'Boiled'"),
        (f"{PLACE}:Cooked", "it must be derived from Raw in"),
        (f"{PLACE}:PLACE", "it must be derived from Raw in"),
        (f"{PLACE}:Raw", "it lacks ['cook']"),
    ],
)
def test_a_class_of_another_kind_is_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build(REGISTRY, {"name": name}, "policy", Raw)
    assert str(error.value).startswith(f"policy.name is {name!r}: {message}")


def test_without_a_base_class_only_the_registry_counts() -> None:
    with pytest.raises(
        ValueError, match=r"is 'cooked_for_tests:Fried': it must be one of \['cooked', 'lost', 'plain'\]$"
    ):
        build(REGISTRY, {"name": f"{PLACE}:Fried"}, "reward")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("numpy", "it must have the form module:name"),
        (":mean", "it must have the form module:name"),
        ("numpy:", "it must have the form module:name"),
        ("no_such_module:f", "there is no module 'no_such_module' to import"),
        ("common.no_such_module:f", "there is no module 'common.no_such_module' to import"),
        ("json:no_such_name", "module 'json' has no 'no_such_name'"),
    ],
)
def test_an_object_that_cannot_be_imported_is_refused_with_the_reason(path: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        import_object(path, "reward.path")
    assert str(error.value) == f"reward.path is {path!r}: {message}"


def test_a_users_module_that_lacks_a_package_fails_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user_rewards_module.py").write_text("import user_rewards\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"raised ModuleNotFoundError: No module named 'user_rewards' \(/.*user_rewards_module.py:1\)"
    ):
        import_object("user_rewards_module:score", "reward.path")

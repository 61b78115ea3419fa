"""Mistyped numbers in a recipe: refused in one line with the key, or a plan that makes sense."""

import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build, import_object, models_in
from ray_ddpo.common.recipe.tables import ComponentTable
from ray_ddpo.deploy.commands.plan.plan import plan
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.deploy.driver.registries import REGISTRIES

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
NAMES = (
    "tiny/jpeg",
    "tiny/held_out",
    "tiny/window",
    "tiny/diffusion_nft",
    "tiny/dpok",
    "tiny/rwr_sparse",
    "tiny/floor",
)
BASES = {name: tomllib.loads((RECIPES / f"{name}.toml").read_text()) for name in NAMES}
VALUES = [0, -1, math.nan, math.inf, 1e308, -1e308, 10**9, 10**300, "text", [1]]
Place = tuple[str, ...]


def number_keys(model: type[BaseModel], table: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the path of every key that takes a number, in a recipe's tables and those of its components."""
    fields = dict(model.model_fields)
    table = table if isinstance(table, dict) else {}
    if issubclass(model, ComponentTable) and model.__name__ in REGISTRIES and "name" in table:
        registry = import_object(REGISTRIES[model.__name__], "registry")
        fields |= import_object(registry[table["name"]], "component").model_fields
    for key, field in fields.items():
        inside = table.get(key)
        tables = list(enumerate(inside)) if isinstance(inside, list) else []
        for inner in models_in(field.annotation):
            for index, each in tables:
                yield from number_keys(inner, each, (*place, key, str(index)))
            if not tables and (inside is not None or field.default is not None):
                yield from number_keys(inner, inside, (*place, key))
        if {int, float} & set(leaves(field.annotation)):
            yield (*place, key)


def leaves(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from leaves(inner)


def changed(tables: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    if isinstance(tables, list):
        return [changed(each, place[1:], value) if str(i) == place[0] else each for i, each in enumerate(tables)]
    return {**tables, place[0]: changed(tables.get(place[0], {}), place[1:], value)}


def accepted(tables: dict[str, Any], place: Place, value: Any) -> Recipe | None:
    """The recipe with this value; None where it is refused, of which one line must name the key."""
    try:
        recipe = Recipe.parse(changed(tables, place, value))
        components_of(recipe)
    except ValueError as error:
        text, key = str(error), ".".join(place)
        assert "\n" not in text and type(error) is ValueError, text
        named = key in text or place[-1] in text or "steps = " in text  # the last: of several keys, their product
        assert named, f"{key} = {value!r} is refused without its name: {text}"
        return None
    return recipe


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("name", NAMES)
def test_a_mistyped_number_is_refused_with_its_key_or_is_of_a_size_that_a_run_can_use(name: str) -> None:
    places = list(number_keys(Recipe, BASES[name]))
    assert {("rounds",), ("learner", "learning_rate"), ("samplers", "num_gpus"), ("policy", "lora", "rank")} <= {
        *places
    }
    for place in places:
        taken = [value for value in VALUES if accepted(BASES[name], place, value) is not None]
        assert not [value for value in taken if isinstance(value, float) or value in ("text", [1])], (place, taken)
        assert all(value <= 10**9 for value in taken), (place, taken)


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_what_is_accepted_has_a_plan_with_finite_numbers() -> None:
    base = BASES["tiny/jpeg"]
    for place in number_keys(Recipe, base):
        for value in (0, 1, 10**4, 10**9):
            recipe = accepted(base, place, value)
            if recipe is None:
                continue
            try:
                text = plan(recipe)
            except ValueError as error:  # the model, whose sizes only the plan knows, does not go with it
                assert place[-1] in str(error) and "\n" not in str(error)
            else:
                assert not re.search(r"\b(nan|inf)\b", text)


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_a_mistyped_number_of_a_reward_is_refused_with_its_key(name: str) -> None:
    cls = import_object(REWARDS[name], "reward")
    for key, field in cls.model_fields.items():
        for value in VALUES if {int, float} & set(leaves(field.annotation)) else ():
            try:
                build(REWARDS, {"name": name, key: value}, "reward")
            except ValueError as error:
                assert "\n" not in str(error)
                assert f"reward.{key}" in str(error) or "is missing" in str(error)
            else:
                assert isinstance(value, int)

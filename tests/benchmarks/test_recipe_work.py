"""Counted operations agree with the formula of FLUX's layers and with the documentation's numbers."""

import re
from pathlib import Path

import pytest

from benchmarks.recipe_work import NAMES, RECIPES, operations
from ray_ddpo.common.diffusion.families.flux import Flux
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.plan.balance import RATE
from ray_ddpo.deploy.driver.components import build_components

PAGE = (Path(__file__).parents[2] / "docs" / "model_families.md").read_text()
WIDTH, TEXT, IMAGE, DOUBLE, SINGLE = 3072, 512, 1024, 19, 38  # FLUX.1-dev at 512 × 512


def flux_forward(rank: int) -> int:
    """Return the operations of one row from the layers' sizes: two per weight and token, plus attention."""
    tokens, width = TEXT + IMAGE, WIDTH
    layer = 12 * width**2 * tokens  # attention 4 and feed-forward 8 in a double layer, fused ones in a single one
    adapters = rank * width * tokens * (DOUBLE * (4 * 2 + 2 * 5) + SINGLE * 3 * 2)
    attention = 2 * tokens**2 * width
    once = width**2 * (DOUBLE * 2 * 6 + SINGLE * 3)  # what scales and shifts a layer, from the image's one vector
    ends = width * (TEXT * 4096 + IMAGE * (64 + 64)) + width * (256 + 256 + 768) + 3 * width**2 + 2 * width**2
    return 2 * ((DOUBLE + SINGLE) * (layer + attention) + adapters + once + ends)


@pytest.mark.thorough
@pytest.mark.usefixtures("counted_once")
def test_flux_operations_follow_from_its_layer_sizes() -> None:
    """Count twelve billion parameters on the meta device, which takes a quarter of a minute."""
    components = build_components(Recipe.load(RECIPES / "families" / "flux_dev_pickscore.toml", []))
    assert isinstance(components.policy, Flux)
    row = components.policy.sizes(components.recipe.sampling).work
    assert row is not None and row.branches == 1
    assert row.forward == flux_forward(components.policy.lora.rank)
    # Backward: as much for activations, in attention twice as much, and a little for the adapters' own gradients.
    assert 2.0 < row.both / row.forward < 2.15


def figures_of(name: str) -> tuple[str, str]:
    """Return the page's numbers of a recipe: TFLOP per image, and GPU-hours."""
    found = re.search(rf"^\| `{name}\.toml` \|[^|]*\|[^|]*\| ([^|]*) \| ([^|]*) \|$", PAGE, re.MULTILINE)
    assert found, f"{name} has no row"
    return found[1], found[2]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sd15_aesthetic", "families/sd35_medium_pickscore", "families/flux_dev_pickscore"])
def test_the_page_shows_the_counted_operations(name: str) -> None:
    recipe = Recipe.load(RECIPES / f"{name}.toml", [])
    flops = operations(recipe)
    hours = flops * recipe.images_per_round * recipe.rounds / RATE / 3600
    assert figures_of(name) == (f"{flops / 1e12:,.0f}", f"{hours:.0f}")


def test_each_recipe_of_the_table_can_be_counted() -> None:
    assert all(figures_of(name) and (RECIPES / f"{name}.toml").is_file() for name in NAMES)

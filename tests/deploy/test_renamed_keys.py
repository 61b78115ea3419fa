"""A recipe with a key or value of an old name is refused, and the error names the new one."""

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.renamed import RENAMED, RENAMED_VALUES
from ray_ddpo.deploy.driver.components import components_of

SHIPPED = {"algorithm.noisings": "tiny/rwr", "algorithm.noised_samples": "tiny/rwr"}
SHIPPED |= dict.fromkeys(("algorithm.ema_decay_growth", "algorithm.ema_decay_max"), "tiny/diffusion_nft")
SERVICE = ["--reward.name", "http", "--reward.url", "http://127.0.0.1:1"]


def load(key: str, value: str) -> None:
    """Check a shipped recipe in which `key` is `value`."""
    shipped = SHIPPED.get(key, "tiny/jpeg")
    components_of(Recipe.load(shipped, [*(SERVICE if key.startswith("reward.") else []), f"--{key}", value]))


@pytest.mark.parametrize("old", [key for key in RENAMED if key not in ("composition", "exhibits")])
def test_an_old_key_is_refused_with_the_new_one(old: str) -> None:
    with pytest.raises(ValueError) as error:
        load(old, "1")
    assert f"{old} is called {RENAMED[old]} now" in str(error.value)


@pytest.mark.parametrize(("table", "key"), [("composition", "join"), ("exhibits", "every")])
def test_an_old_table_is_refused_with_the_new_one(table: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{table} is called {RENAMED[table]} now"):
        load(f"{table}.{key}", "1")


@pytest.mark.parametrize(("key", "old"), RENAMED_VALUES)
def test_an_old_value_is_refused_with_the_new_one(key: str, old: str) -> None:
    with pytest.raises(ValueError) as error:
        load(key, old)
    assert f"{key} is '{old}': this value is called '{RENAMED_VALUES[key, old]}' now" in str(error.value)


@pytest.mark.parametrize("new", sorted(RENAMED.values()))
def test_every_new_name_is_a_key(new: str) -> None:
    with pytest.raises(ValueError) as error:
        load(new, "{}")
        raise ValueError("")  # an empty table is accepted as one
    assert "is not a key" not in str(error.value) and "is called" not in str(error.value)

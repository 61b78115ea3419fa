"""docs/rewards.md and the room of rewards are compared both ways, and the page's examples are recipes that are accepted."""

import re
import tomllib
from pathlib import Path

import pytest

from actors.rewards import REWARDS
from actors.rewards.reward import Reward
from common.registry import build, entry_class

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "rewards.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
ELSEWHERE = {"function": "extending.md", "http": "reward_service.md", "vlm_alignment": "vlm_alignment.md"}


def rows() -> dict[str, list[str]]:
    """The cells of the first table, by the reward's name."""
    table = PAGE[PAGE.index("| name |") :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {name.strip("`"): rest for name, *rest in cells}


def entry(name: str) -> Reward:
    needed = {"function": {"path": "tests.user_functions:brightness"}, "http": {"url": "http://localhost:8000"}}
    return build(REWARDS, {"name": name, **needed.get(name, {})}, "reward")


def test_every_reward_has_a_row_and_every_row_is_a_reward() -> None:
    assert set(rows()) == set(REWARDS)


@pytest.mark.parametrize("name", REWARDS)
def test_a_row_says_what_the_entry_says(name: str) -> None:
    reward, (_, _, weights, _, memory, same_bits) = entry(name), rows()[name]
    assert same_bits.partition(",")[0] == ("yes" if reward.independent_of_batch else "no")
    for needed in reward.needs():
        assert f"`{needed.source}`" in weights
        assert needed.files[0] in ("config.json", "tokenizer.json") or f"`{needed.files[0]}`" in weights
    if reward.memory_bytes:
        full = entry_class(REWARDS, name, "reward")(dtype="float32").memory_bytes  # type: ignore[attr-defined]
        assert memory == f"{reward.memory_bytes / 1e9:.2f} / {full / 1e9:.2f} GB"


def test_the_examples_are_accepted_and_show_every_reward_that_takes_keys_of_its_own() -> None:
    shown = set()
    for example in EXAMPLES:
        tables = tomllib.loads(example)
        for table in tables.get("rewards", [tables.get("reward")]):
            build(REWARDS, {key: value for key, value in table.items() if key != "weight"}, "reward")
            shown.add(table["name"])
    with_keys = {name for name in REWARDS if entry_class(REWARDS, name, "reward").model_fields}
    assert with_keys - set(ELSEWHERE) <= shown
    assert all(f'name = "{name}"' in (DOCS / page).read_text(encoding="utf-8") for name, page in ELSEWHERE.items())

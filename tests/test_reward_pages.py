"""The pages on rewards agree with the registry, and with the program's messages and defaults."""

import re
import tomllib
from pathlib import Path

import pytest

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.http import Http
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.actors.rewards.vlm_alignment import VlmAlignment
from ray_ddpo.common.recipe.registry import build, component_class
from ray_ddpo.common.recipe.tables import RewardTable
from ray_ddpo.common.reward_protocol import Fault, Health, ScoreReply, ScoreRequest
from ray_ddpo.deploy.driver.components import build_reward
from tests.test_documentation import blocks

DOCS = Path(__file__).parents[1] / "docs"
SERVICE, VLM = DOCS / "reward_service.md", DOCS / "vlm_alignment.md"
PAGE = (DOCS / "rewards.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
ELSEWHERE = {
    "function": "extending.md",
    "http": "reward_service.md",
    "vlm_alignment": "vlm_alignment.md",
    "vlm_judge": "vlm_judge.md",
    "unified_reward": "vlm_judge.md",
}
URL = "http://localhost:8000"


def rows() -> dict[str, list[str]]:
    """Return the cells of the first table by the reward's name."""
    table = PAGE[PAGE.index("| name |") :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {name.strip("`"): rest for name, *rest in cells}


def entry(name: str) -> Reward:
    needed = {
        "function": {"path": "tests.user_functions:brightness"},
        "http": {"url": URL},
        "vlm_judge": {"url": f"{URL}/v1", "model": "a-model"},
        "unified_reward": {"url": f"{URL}/v1"},
    }
    return build(REWARDS, {"name": name, **needed.get(name, {})}, "reward")


def test_every_reward_has_a_row_and_every_row_is_a_reward() -> None:
    assert set(rows()) == set(REWARDS)


@pytest.mark.parametrize("name", REWARDS)
def test_a_row_agrees_with_the_reward_class(name: str) -> None:
    reward, (_, weights, _, memory, same_bits) = entry(name), rows()[name]
    assert same_bits.partition(",")[0] == ("yes" if reward.independent_of_batch else "no")
    for needed in reward.needs():
        assert f"`{needed.source}`" in weights
        assert needed.files[0] in ("config.json", "tokenizer.json") or f"`{needed.files[0]}`" in weights
    if reward.memory_bytes:
        shown = f"{reward.memory_bytes / 1e6:.0f} MB, always full"
        if "dtype" in type(reward).model_fields:
            full = component_class(REWARDS, name, "reward")(dtype="float32").memory_bytes  # type: ignore[attr-defined]
            shown = f"{reward.memory_bytes / 1e9:.2f} / {full / 1e9:.2f} GB"
        assert memory == shown


def test_the_examples_are_valid_and_cover_every_reward_with_keys() -> None:
    shown = set()
    for example in EXAMPLES:
        tables = tomllib.loads(example)
        for table in tables.get("rewards", [tables.get("reward")]):
            build_reward(RewardTable.model_validate(table))
            shown.add(table["name"])
    with_keys = {name for name in REWARDS if component_class(REWARDS, name, "reward").model_fields}
    assert with_keys - set(ELSEWHERE) <= shown
    assert all(f'name = "{name}"' in (DOCS / page).read_text(encoding="utf-8") for name, page in ELSEWHERE.items())


def example(page: Path) -> object:
    (text,) = blocks(page, "toml")
    return build(REWARDS, tomllib.loads(text)["reward"], "reward")


def test_the_service_example_is_valid_and_shows_the_defaults() -> None:
    shown = example(SERVICE)
    assert isinstance(shown, Http)
    plain = Http(url=shown.url)
    changed = {"token_variable": "REWARD_TOKEN", "images_per_request": 16}
    assert shown == plain.model_copy(update=changed)


def test_the_pages_messages_are_valid_in_the_protocol() -> None:
    texts = blocks(SERVICE, "json")
    kinds = (ScoreRequest, ScoreReply, Health, Fault)
    assert len(texts) == len(kinds)
    for kind, text in zip(kinds, texts, strict=True):
        kind.model_validate_json(text)


def test_the_vlm_alignment_example_shows_the_defaults() -> None:
    assert example(VLM) == VlmAlignment()

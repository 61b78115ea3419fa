"""The pages of single rewards: their recipes are built, their messages are read, and their defaults are the program's."""

import tomllib
from pathlib import Path

from actors.rewards import REWARDS
from actors.rewards.http import Http
from actors.rewards.vlm_alignment import VlmAlignment
from common.registry import build
from common.reward_protocol import Fault, Health, ScoreReply, ScoreRequest
from tests.test_documentation import ROOT, blocks

SERVICE, VLM = ROOT / "docs" / "reward_service.md", ROOT / "docs" / "vlm_alignment.md"


def example(page: Path) -> object:
    (text,) = blocks(page, "toml")
    return build(REWARDS, tomllib.loads(text)["reward"], "reward")


def test_the_example_of_a_service_is_a_reward_and_says_the_defaults() -> None:
    shown = example(SERVICE)
    assert isinstance(shown, Http)
    plain = Http(url=shown.url)
    changed = {"token_variable": "REWARD_TOKEN", "pictures_per_request": 16}
    assert shown == plain.model_copy(update=changed)


def test_the_messages_on_the_page_are_messages_of_the_protocol() -> None:
    texts = blocks(SERVICE, "json")
    kinds = (ScoreRequest, ScoreReply, Health, Fault)
    assert len(texts) == len(kinds)
    for kind, text in zip(kinds, texts, strict=True):
        kind.model_validate_json(text)


def test_the_example_of_vlm_alignment_says_the_defaults() -> None:
    assert example(VLM) == VlmAlignment()

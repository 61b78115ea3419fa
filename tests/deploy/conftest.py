"""A model hub for the tests of publishing, and a suite of few prompts."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from ray_ddpo.common.prompt_set import shipped_file
from ray_ddpo.common.suites import SUITES, Suite
from tests.hub_server import Hub, hub
from tests.publishing import TOKEN, TOKENS


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[str, Hub]]:
    with hub(TOKENS) as (url, held):
        yield url, held


@pytest.fixture
def online(served: tuple[str, Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    """This process speaks to the hub of the tests, as HF_ENDPOINT would make a new one do."""
    url, held = served
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    held.failing.clear()
    return held


@pytest.fixture
def small_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Put six prompts of two categories where those of GenEval would be."""
    rows = [json.loads(line) for line in shipped_file("shapes", "test").read_text().splitlines()]
    chosen = [row for tag in ("colors", "counting") for row in [row for row in rows if row["tag"] == tag][:3]]
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "geneval_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    scorers = ({"name": "geneval", "detector": "shapes"}, {"name": "brightness"})
    suite = replace(SUITES["geneval"], images_per_prompt=2, scorers=scorers)
    monkeypatch.setitem(SUITES, "geneval", suite)
    return suite

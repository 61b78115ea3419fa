"""A model hub for the tests of publishing."""

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

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

"""The token of a reward service: from the environment to the service, and nowhere else."""

import logging
import traceback

import pytest

from ray_ddpo.actors.rewards.http import Http, RewardServiceFailed
from ray_ddpo.actors.rewards.jpeg import JpegCompressibility
from ray_ddpo.common.recipe.registry import build
from tests.actors.rewards.test_http import GOOD, IMAGES, METADATA, PROMPTS, ask, hang_up
from tests.reward_services import Answer, scripted, serving

TOKEN = "s3cret-token-f00dface"


def test_the_token_comes_from_the_environment_and_opens_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    with serving(JpegCompressibility(), token=TOKEN) as url:
        assert ask(url, token_variable="REWARD_TOKEN").shape == (3,)
        with pytest.raises(RewardServiceFailed, match="answered 401: .*a bearer token is needed"):
            ask(url)
        monkeypatch.setenv("REWARD_TOKEN", "another")
        with pytest.raises(RewardServiceFailed, match="answered 401"):
            ask(url, token_variable="REWARD_TOKEN")


def test_the_token_is_in_no_error_log_or_repr(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    echo: Answer = (403, b"x" * 170 + f"no such token: {TOKEN}".encode(), {})
    said = []
    with scripted(echo, (200, TOKEN.encode(), {}), hang_up, GOOD) as (url, script):
        reward = Http(url=url, token_variable="REWARD_TOKEN", attempts=1)
        score = reward.load("cpu")
        for _ in range(3):
            with pytest.raises(RewardServiceFailed) as error:
                score(IMAGES, PROMPTS, METADATA)
            said += [str(error.value), repr(error.value), "".join(traceback.format_exception(error.value))]
        score(IMAGES, PROMPTS, METADATA)
    assert {each.headers["Authorization"] for each in script.asked} == {f"Bearer {TOKEN}"}
    assert "…" in said[3]
    said += [repr(reward), str(reward.model_dump()), caplog.text, *capfd.readouterr()]
    assert len(caplog.text) > 100, "the client logs at this level"
    assert [text for text in said if TOKEN[:6] in text] == []


@pytest.mark.parametrize("value", [None, "", "two words", "line\n", "tokén"])
def test_a_token_that_is_not_there_or_none_is_told_by_its_variable(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(ValueError, match="the environment variable REWARD_TOKEN, which token_variable names") as error:
        Http(url="http://127.0.0.1:1", token_variable="REWARD_TOKEN").load("cpu")
    assert not value or value not in str(error.value)


@pytest.mark.parametrize(
    "table",
    [
        {"url": "http://127.0.0.1:1", "token_variable": "ghp_s3cret"},
        {"url": "http://user:s3cret@host:80/path"},
        {"url": "http://s3cret@host"},
        {"url": "https://host/score?key=s3cret"},
        {"url": "ftp://user:s3cret@host"},
        {"url": "//user:s3cret@host"},
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_shown(table: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"reward\.(url|token_variable) is") as error:
        build({"http": "ray_ddpo.actors.rewards.http:Http"}, {"name": "http", **table}, "reward")
    assert "s3cret" not in "".join(traceback.format_exception(error.value))

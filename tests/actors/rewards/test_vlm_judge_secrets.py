"""The key of a judge's service: from the environment to the service, and nowhere else."""

import logging
import pickle
import traceback
from pathlib import Path

import pytest

from ray_ddpo.actors.rewards.service_client import RewardServiceFailed
from ray_ddpo.actors.rewards.vlm_judge import JudgeQuestion, VlmJudge
from tests.actors.rewards.test_vlm_judge import IMAGES, NUMBER, PROMPTS
from tests.chat_services import MODEL, chat_service, says
from tests.reward_services import Answer, scripted

KEY = "sk-proj-f00dfaceQzXwVuTsRq"


def test_the_key_comes_from_the_environment_and_opens_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with chat_service(tmp_path / "vlm", token=KEY) as url:
        monkeypatch.setenv("JUDGE_KEY", KEY)
        named = VlmJudge(url=url, model=MODEL, token_variable="JUDGE_KEY", questions=(JudgeQuestion(text="is this"),))
        assert named.load("cpu")(IMAGES, PROMPTS, [{}] * 3).shape == (3,)
        monkeypatch.setenv("JUDGE_KEY", "another")
        for reward in (named, VlmJudge(url=url, model=MODEL)):
            with pytest.raises(RewardServiceFailed, match="answered 401"):
                reward.load("cpu")(IMAGES, PROMPTS, [{}] * 3)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="the environment variable JUDGE_KEY, which token_variable names, is not set"):
        named.load("cpu")


def test_the_key_is_in_no_error_log_cache_or_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo: Answer = (401, f"Incorrect API key provided: {KEY}".encode(), {})
    said, folder = [], tmp_path / "answers"
    with scripted(echo, says(f"your key is {KEY}"), (200, KEY.encode(), {}), says("7")) as (url, script):
        reward = VlmJudge(
            url=url,
            model=MODEL,
            token_variable="JUDGE_KEY",
            questions=(NUMBER,),
            attempts=1,
            requests_at_once=1,
            cache_folder=str(folder),
        )
        loaded = reward.load("cpu")
        for row in range(3):
            with pytest.raises(RewardServiceFailed) as error:
                loaded(IMAGES[row : row + 1], PROMPTS[row : row + 1], [{}])
            said += [str(error.value), repr(error.value), "".join(traceback.format_exception(error.value))]
        loaded(IMAGES[:1], PROMPTS[:1], [{}])
    assert {each.headers["Authorization"] for each in script.asked} == {f"Bearer {KEY}"}
    assert all("…" in text for text in said[::3]), "the service repeated the key each time"
    said += [repr(reward), str(reward.model_dump()), repr(loaded), caplog.text, *capfd.readouterr()]
    said += [path.read_bytes().decode("latin-1") for path in folder.iterdir()]
    said.append(pickle.dumps(reward).decode("latin-1"))
    assert len(caplog.text) > 100, "the client logs at this level"
    assert [text for text in said if KEY[:12] in text] == []

"""A run with the reward service has the bits of a run that scores by itself."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo.actors.rewards.http import Http
from ray_ddpo.actors.rewards.jpeg import JpegCompressibility
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import without_none
from ray_ddpo.deploy.commands.doctor.checks import reward_findings
from tests.reward_services import scripted, serving
from tests.system.conftest import final_fingerprint

TOKEN = "s3cret-token-f00dface"
ROOT = Path(__file__).parents[2]


@contextmanager
def served(recipe: Path) -> Iterator[str]:
    """`ddpo serve-reward` as a user types it; the URL that it prints."""
    command = [
        sys.executable,
        "-m",
        "ray_ddpo",
        "serve-reward",
        str(recipe),
        "--port",
        "0",
        "--token-variable",
        "SERVICE_TOKEN",
    ]
    environment = {**os.environ, "SERVICE_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        words = process.stdout.readline().split()
        assert words[:3] == ["serving", "jpeg_compressibility", "at"] and words[-1] == "SERVICE_TOKEN", words
        yield words[3].removesuffix("/v1/score,")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@pytest.mark.thorough
def test_a_run_through_the_service_has_the_fingerprint_of_the_run_without_it(
    tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(without_none(tables)))
    monkeypatch.setenv("RUN_TOKEN", TOKEN)
    inside = final_fingerprint(Recipe.parse({**tables, "name": "inside"}), serial=True)
    with served(tmp_path / "recipe.toml") as url:
        reward = {"name": "http", "url": url, "token_variable": "RUN_TOKEN"}
        recipe = Recipe.parse({**tables, "name": "through", "reward": reward})
        assert final_fingerprint(recipe, serial=True) == inside
    left = b"".join(path.read_bytes() for path in Path(recipe.run_path()).rglob("*") if path.is_file())
    assert b"RUN_TOKEN" in left and TOKEN.encode() not in left


def test_the_doctor_asks_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    with serving(JpegCompressibility(), token=TOKEN) as url:
        right, without = Http(url=url, token_variable="REWARD_TOKEN"), Http(url=url)
        (finding,) = reward_findings("reward", "http", right)
        assert finding.level == "ok"
        (finding,) = reward_findings("reward", "http", without)
        assert finding.level == "fault" and f"http cannot score: {url} answered 401" in finding.found
    (finding,) = reward_findings("reward", "http", right)
    assert finding.level == "fault" and f"{url} does not answer: ConnectError" in finding.found and finding.advice
    with scripted((200, b"<html>Welcome</html>", {})) as (url, script):
        (finding,) = reward_findings("reward", "http", Http(url=url))
        assert finding.level == "fault" and "<html>Welcome" in finding.found
        assert [each.path for each in script.asked] == ["/v1/health"]
    monkeypatch.delenv("REWARD_TOKEN")
    (finding,) = reward_findings("reward", "http", right)
    assert finding.level == "fault" and "REWARD_TOKEN" in finding.found

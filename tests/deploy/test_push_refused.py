"""What of publishing is refused, and when: before anything is trained, and never with the token in the words."""

import os
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy import hub
from ray_ddpo.deploy.commands.doctor.checks import push_findings
from ray_ddpo.deploy.hub import base_model, license_of
from tests.hub_server import Hub, Repository
from tests.publishing import READS, recipe_file
from tests.reward_services import scripted

REFUSED = [
    ({"HF_TOKEN": ""}, {}, "HF_TOKEN is not set"),
    ({"HF_TOKEN": "hf_ünheard"}, {}, "HF_TOKEN has characters that no token has"),
    ({"HF_TOKEN": "hf_of_nobody"}, {}, "the hub does not know the token HF_TOKEN"),
    ({"HF_TOKEN": READS}, {}, "the token HF_TOKEN of alice may only read"),
    ({}, {"repo": "bob/tiny"}, "alice, whose token HF_TOKEN is, may write in ['alice', 'museum', 'zoo'] alone"),
    ({}, {"repo": "museum/tiny"}, "alice in museum may only read"),
    ({}, {"repo": "alice/ti--ny"}, "Cannot have -- or .. in repo_id"),
    ({}, {"repo": "alice/open", "private": True}, "alice/open is there and public"),
    ({}, {"repo": "tiny"}, "push.repo is 'tiny'"),
    ({}, {"license": None}, "push.license is not given"),
    ({}, {"license": "mine-alone"}, "['license'] is not allowed"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[says for _, _, says in REFUSED])
def test_what_will_not_be_taken_is_said_before_training(
    case: tuple[dict, dict, str],
    online: Hub,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    environment, push, says = case
    online.repositories.setdefault("alice/open", Repository(private=False))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = {"repo": "alice/new", "license": "mit", **push}
    recipe = recipe_file(tmp_path, tiny_model, push={key: value for key, value in asked.items() if value is not None})
    before = set(online.repositories)
    assert cli.main(["train", str(recipe), "--serial"]) == 2
    printed = capsys.readouterr()
    token = os.environ["HF_TOKEN"]
    assert says in printed.err and not (token and token in printed.out + printed.err)
    assert set(online.repositories) == before and not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


@pytest.mark.parametrize("endpoint", ["whoami", "repos/create", "auth-check"])
def test_a_hub_that_does_not_answer_is_said_before_training(
    endpoint: str, online: Hub, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture
) -> None:
    online.failing[endpoint] = 500
    assert cli.main(["train", str(recipe_file(tmp_path, tiny_model)), "--serial"]) == 2
    assert "the hub answers 500" in capsys.readouterr().err and not (tmp_path / "runs/tiny/metrics.jsonl").exists()


def test_a_hub_that_never_answers_is_not_waited_for(
    online: Hub, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe_file(tmp_path, tiny_model)  # all that `push` reads of a run before it asks the hub
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
    with scripted(lambda _: time.sleep(1)) as (url, _):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert cli.main(["push", str(tmp_path), "alice/tiny"]) == 3
    assert "not pushed: the hub does not answer as it should: ReadTimeout" in capsys.readouterr().err


def test_nobody_there_is_exit_code_3_of_push(
    online: Hub, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe_file(tmp_path, tiny_model)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["push", str(tmp_path), "alice/tiny"]) == 3
    assert "not pushed: the hub does not answer" in capsys.readouterr().err


def test_the_doctor_says_who_may_publish_and_makes_nothing(
    online: Hub, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(recipe_file(tmp_path, tiny_model, push={"repo": "zoo/planned", "license": "mit"}))
    (finding,) = push_findings(recipe)
    assert (finding.level, finding.found) == ("ok", "alice may publish zoo/planned, under mit")
    assert "zoo/planned" not in online.repositories
    monkeypatch.delenv("HF_TOKEN")
    (finding,) = push_findings(recipe)
    assert finding.level == "fault" and "HF_TOKEN is not set" in finding.found
    assert list(push_findings(Recipe.load(recipe_file(tmp_path, tiny_model, push={})))) == []


@pytest.mark.parametrize(
    ("model", "push", "license", "base"),
    [
        ("tiny_animals", {}, "apache-2.0", None),
        (
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            {},
            "creativeml-openrail-m",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        (
            "/models/sd15",
            {"base_model": "CompVis/stable-diffusion-v1-4"},
            "creativeml-openrail-m",
            "CompVis/stable-diffusion-v1-4",
        ),
        ("somebody/model", {"license": "mit"}, "mit", "somebody/model"),
    ],
)
def test_licence_and_base_model_follow_from_the_model(
    model: str, push: dict, license: str, base: str | None, tmp_path: Path
) -> None:
    recipe = Recipe.load(
        recipe_file(tmp_path, tmp_path, policy={"name": "stable_diffusion", "model": model}, push=push)
    )
    assert (license_of(recipe), base_model(recipe)) == (license, base)

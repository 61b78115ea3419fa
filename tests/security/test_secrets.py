"""Secrets of the environment, and misplaced ones, are in no file that a run writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.actors.rewards.jpeg import JpegCompressibility
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import without_none
from tests.chat_services import MODEL, chat_service
from tests.reward_services import serving

ROOT = Path(__file__).parents[2]
# Long, of one alphabet, and unlike each other, so that a part of one is found too.
SECRETS = {
    "HF_TOKEN": "hf_qvXkTzRwPnLmJhGfDsAqWeRtYuIoP",
    "WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
    "RAY_AUTH_TOKEN": "rayqzxwvutsrponmlkjihgfedcba9876543210zz",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYzzzzzzzzKEYq",
    "AWS_SESSION_TOKEN": "sessionQQQQwwwwEEEErrrrTTTTyyyyUUUU",
    "REWARD_TOKEN": "rewardservicebearerXyZ0123456789token",
    "JUDGE_KEY": "sk-proj-JudGeKeYabcdefGHIJKLmnop987654",
}
pytestmark = pytest.mark.thorough
TRAIN_AND_REPORT = """
import sys
from ray_ddpo import cli
sys.exit(cli.main(["train", "recipe.toml", "--serial"]) or cli.main(["report", "runs/watched"]))
"""
PASSWORD = "pa55w0rdN3verSh0wn"


def shown(text: bytes) -> list[str]:
    """The secrets of which a part is in the text."""
    return [
        name
        for name, secret in {**SECRETS, "PASSWORD": PASSWORD}.items()
        if secret[4:16].encode().lower() in text.lower()
    ]


def left_by(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[bytes]]:
    """A run with every tracker and a reward service that asks for a token, and its report."""
    home = tmp_path_factory.mktemp("secrets")
    with (
        serving(JpegCompressibility(), token=SECRETS["REWARD_TOKEN"]) as url,
        chat_service(home.parent / "secrets_vlm", token=SECRETS["JUDGE_KEY"]) as chat,
    ):
        tables = {
            "name": "watched",
            "rounds": 1,
            "policy": {"name": "stable_diffusion", "model": "tiny_animals"},
            "prompts": {"name": "animals"},
            "sampling": {"num_steps": 2, "batch_size": 2, "batches_per_round": 1},
            "rewards": [
                {"name": "http", "url": url, "token_variable": "REWARD_TOKEN"},
                {
                    **{"name": "vlm_judge", "url": chat, "model": MODEL, "token_variable": "JUDGE_KEY"},
                    **{"cache_folder": str(home / "answers"), "questions": [{"text": "is this a {prompt}"}]},
                },
            ],
            "algorithm": {"name": "ddpo_is"},
            "learner": {"batch_size": 2, "micro_batch_size": 4},
            "evaluation": {"images": 2, "batch_size": 2},
            "trackers": [{"name": name} for name in ("wandb", "tensorboard", "jsonl", "terminal")],
        }
        (home / "recipe.toml").write_text(tomli_w.dumps(tables))
        environment = {**os.environ, **SECRETS, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", TRAIN_AND_REPORT], cwd=home, env=environment, capture_output=True, timeout=300
        )
    return home, done


@pytest.mark.rotated(every=2, group="longest")
def test_a_run_and_its_report_hold_no_secret(finished: tuple[Path, subprocess.CompletedProcess[bytes]]) -> None:
    home, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    files = left_by(home)
    names = " ".join(files)
    for what in (
        "recipe.toml",
        "report.html",
        "summary.json",
        "metrics.jsonl",
        ".wandb",
        "tfevents",
        "state.json",
        "parquet",
    ):
        assert what in names, what
    assert b"REWARD_TOKEN" in files["runs/watched/recipe.toml"], "its name is no secret"
    assert {name: found for name, text in files.items() if (found := shown(text))} == {}
    assert shown(done.stdout + done.stderr) == []


def test_a_secret_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"\0" + SECRETS["HF_TOKEN"][2:20].upper().encode())
    assert {name: shown(text) for name, text in left_by(tmp_path).items()} == {"a/b": ["HF_TOKEN"]}


@pytest.mark.parametrize(
    "override",
    [
        ("--output_dir", f"s3://AKIAEXAMPLE:{PASSWORD}@bucket/runs"),
        ("--reward", f'{{ name = "http", url = "http://user:{PASSWORD}@127.0.0.1:1" }}'),
        ("--policy.model", f"https://user:{PASSWORD}@host/model"),
        ("--prompts", f'{{ name = "file", path = "ftp://user:{PASSWORD}@host/prompts" }}'),
        ("--trackers", f'[{{ name = "wandb", project = "https://{PASSWORD}@host" }}]'),
        ("--learner.learning_rate", f"https://user:{PASSWORD}@host"),
        ("--no.such.key", f"https://user:{PASSWORD}@host"),
    ],
)
def test_a_password_in_a_recipe_is_refused_before_anything_is_written(
    tmp_path: Path,
    tables: dict,
    override: tuple[str, str],
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(without_none(tables)))
    for verb in ("train", "plan", "doctor", "serve-reward"):
        assert cli.main([verb, "recipe.toml", *override]) == 2
        said = capfd.readouterr()
        assert override[0].removeprefix("--") in said.err and "Traceback" not in said.err
        assert shown((said.out + said.err).encode()) == []
    assert [name for name in left_by(tmp_path) if name != "recipe.toml" and not name.startswith("model")] == []


def test_a_password_in_a_command_that_is_not_understood_is_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "recipe.toml").write_text("")
    uri = f"https://user:{PASSWORD}@host"
    for words in ((uri,), ("--a", uri, "--b"), ("--policy", uri, "--policy.model", "x")):
        assert cli.main(["plan", str(tmp_path / "recipe.toml"), *words]) == 2
    assert cli.main(["plan", uri]) == 2
    said = capfd.readouterr().err
    assert said.count("…@host") == 4 and shown(said.encode()) == []


@pytest.mark.parametrize("verb", [("report",), ("status",), ("replay", "--round", "0"), ("sample", "cat", "--lora")])
@pytest.mark.parametrize("scheme", ["s3", "http", "gs"])
def test_a_password_in_the_place_of_a_run_is_not_shown(
    verb: tuple[str, ...], scheme: str, capfd: pytest.CaptureFixture
) -> None:
    assert cli.main([*verb, f"{scheme}://user:{PASSWORD}@host/runs/one"]) == 2
    said = capfd.readouterr()
    assert "environment" in said.err and shown((said.out + said.err).encode()) == []


def test_a_prompt_with_an_address_is_a_prompt(tables: dict) -> None:
    texts = ["a sign that says mail@example.org", "http://example.org at night"]
    assert Recipe.parse({**tables, "prompts": {"name": "texts", "texts": texts}})

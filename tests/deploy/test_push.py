"""ddpo push against a hub on this machine: what is uploaded, that it loads, what is refused early; and no token is seen."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file

import ddpo
import deploy.hub
from common.config import Recipe
from common.run_folder import RunFolder
from deploy.commands.doctor_checks import push_findings
from deploy.hub import base_model, license_of
from learner.resume import resume_point
from tests.hub_server import Hub, Repository, hub, user
from tests.reward_services import scripted

TOKEN = "hf_s3cretNeverToBeShown"
READS = "hf_readsAlone"
ROOT = Path(__file__).parents[2]
TOKENS = {TOKEN: user("alice", orgs={"zoo": "write", "museum": "read"}), READS: user("alice", role="read")}
EVALUATION = {"every": 1, "prompts": ["cat", "dog"], "images": 4, "batch_size": 4, "scorers": [{"name": "brightness"}]}


@pytest.fixture(scope="module")
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
    held.asked.clear()
    return held


def recipe_file(folder: Path, model: Path, **changes: object) -> Path:
    """A run of two short rounds on the tiny pipeline; its policy is soon further off than the guard allows."""
    tables: dict = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "rounds": 2,
        "policy": {"name": "stable_diffusion", "model": str(model)},
        "prompts": {"name": "animals"},
        "sampling": {"num_steps": 4, "guidance_scale": 3.0, "batch_size": 4, "batches_per_round": 1},
        "reward": {"name": "jpeg_compressibility"},
        "algorithm": {"name": "ddpo_is", "clip_range": 1e-3},
        "learner": {"batch_size": 4, "micro_batch_size": 8, "learning_rate": 1e-3},
        "evaluation": EVALUATION,
        "guard": {"max_kl_nats": 1e-9},
        "push": {"repo": "alice/tiny", "license": "mit"},
        **changes,
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def with_the_hub(url: str) -> dict[str, str]:
    added = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **added, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def said(served: tuple[str, Hub], folder: Path, tiny_model: Path) -> str:
    """`ddpo train` of a recipe with `[push]`, as a user types it: what it prints."""
    command = [sys.executable, ROOT / "ddpo.py", "train", recipe_file(folder, tiny_model), "--serial"]
    done = subprocess.run(command, cwd=folder, env=with_the_hub(served[0]), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(folder: Path, said: str) -> Path:
    return folder / "runs" / "tiny"


def test_a_run_is_published_when_it_has_ended(said: str, run: Path, served: tuple[str, Hub]) -> None:
    url, held = served
    files = held.files("alice/tiny")
    assert f"{url}/alice/tiny/commit/" in said
    weights = (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    assert files["pytorch_lora_weights.safetensors"] == weights
    assert files["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    assert files["before_after.png"] == (run / "report" / "before_after.png").read_bytes()
    summary = json.loads(files["summary.json"])
    (message,) = held.repositories["alice/tiny"].messages
    assert message == f"tiny: version 2, fingerprint {summary['fingerprint'][:12]}"
    assert summary["fingerprint"] == json.loads((run / "report" / "summary.json").read_text())["fingerprint"]
    assert sorted(files) == [
        "README.md",
        "before_after.png",
        "evaluations.jsonl",
        "metrics.jsonl",
        "pytorch_lora_weights.safetensors",
        "recipe.toml",
        "reward_curve.png",
        "summary.json",
    ]


def test_the_card_tells_what_was_done_and_found(run: Path, served: tuple[str, Hub]) -> None:
    files = served[1].files("alice/tiny")
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert {"lora", "diffusers", "ddpo", "ray-ddpo", "reinforcement-learning", "text-to-image"} <= set(data["tags"])
    assert "base_model" not in data  # it is a folder of this machine
    summary = json.loads(files["summary.json"])
    for told in (
        summary["fingerprint"],
        "jpeg\\_compressibility | trained on",
        "brightness | only looked at",
        "LoRA of rank 4",
    ):
        assert told in card.text
    assert "At the last version the guard has found: the policy is" in card.text
    assert len(re.findall(r"^\| [12] \| kl \| the policy is .* nats", card.text, flags=re.MULTILINE)) == 2
    assert files["recipe.toml"].decode().strip() in card.text and str(run.parent) not in card.text
    published = Recipe.from_toml(files["recipe.toml"].decode(), "there", [])
    ours = RunFolder(run).load_recipe([])
    private = {"output_dir", "push"}
    assert published.model_dump(exclude=private) == ours.model_dump(exclude=private)


def test_the_cards_program_draws_the_pictures_of_ddpo_sample(
    run: Path, served: tuple[str, Hub], tmp_path: Path
) -> None:
    url, held = served
    (program,) = re.findall(r"```python\n(.*?)```", held.files("alice/tiny")["README.md"].decode(), flags=re.DOTALL)
    alone = (
        'import sys\nassert not any(name.partition(".")[0] in ("common", "actors", "learner") for name in sys.modules)'
    )
    environment = {**with_the_hub(url), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", f"{program}\n{alone}"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    assert ddpo.main(["sample", "--lora", str(run), "--output", str(tmp_path / "ours"), "cat"]) == 0
    plain, ours = (
        np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("picture.png", "ours/000-cat-seed0.png")
    )
    assert np.abs(plain - ours).max() <= 1 and plain.std() > 1


def dry(run: Path, folder: Path, *options: str) -> dict[str, bytes]:
    assert ddpo.main(["push", str(run), "alice/tiny", "--dry-run", str(folder), *options]) == 0
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_needs_no_token_and_writes_the_bytes_that_are_uploaded(
    run: Path, served: tuple[str, Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    asked = len(served[1].asked)
    assert dry(run, tmp_path / "out") == served[1].files("alice/tiny")
    assert len(served[1].asked) == asked
    assert ddpo.main(["push", str(run), "alice/tiny", "--dry-run", str(tmp_path / "out")]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_the_token_is_in_no_file_and_no_word(said: str, folder: Path, served: tuple[str, Hub]) -> None:
    left = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(left) > 10 and not any(
        TOKEN.encode() in data for data in [*left, *served[1].files("alice/tiny").values()]
    )
    assert TOKEN not in said and ("GET", "/api/whoami-v2") in served[1].asked


def test_the_best_version_is_published_as_itself(run: Path, online: Hub, tmp_path: Path) -> None:
    last, best = dry(run, tmp_path / "last"), dry(run, tmp_path / "best", "--version", "best")
    name = "pytorch_lora_weights.safetensors"
    assert best[name] == (run / "best" / "lora" / name).read_bytes() != last[name]
    told, kept = json.loads(best["summary.json"]), json.loads((run / "best" / "best.json").read_text())
    assert (told["policy_version"], told["fingerprint"]) == (0, kept["fingerprint"])
    assert told["reward_before"] == told["reward_after"]  # it is the pretrained model
    assert "these weights" in best["README.md"].decode() and best["before_after.png"] != last["before_after.png"]
    options = ["--version", "best", "--private", "--revision", "best"]
    assert ddpo.main(["push", str(run), "zoo/best", *options]) == 0
    assert online.repositories["zoo/best"].private and online.files("zoo/best", "main") == {}
    uploaded = online.files("zoo/best", "best")
    assert uploaded[name] == best[name] and "'zoo/best'" in uploaded["README.md"].decode()
    assert "revision='best'" in uploaded["README.md"].decode()


def test_weights_of_an_earlier_push_do_not_stay(run: Path, online: Hub) -> None:
    earlier = {"unet/diffusion_pytorch_model.safetensors": b"old", "notes.txt": b"theirs", "README.md": b"old"}
    online.repositories["zoo/again"] = Repository(private=False, branches={"main": earlier})
    assert ddpo.main(["push", str(run), "zoo/again"]) == 0
    files = online.files("zoo/again")
    assert "unet/diffusion_pytorch_model.safetensors" not in files and files["notes.txt"] == b"theirs"
    assert files["README.md"].startswith(b"---")


def test_weights_that_are_not_the_runs_are_not_published(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = run / "lora" / "pytorch_lora_weights.safetensors"
    ours = file.read_bytes()
    try:
        file.write_bytes((run / "best" / "lora" / file.name).read_bytes())
        assert ddpo.main(["push", str(run), "alice/tiny", "--dry-run", str(tmp_path / "out")]) == 2
    finally:
        file.write_bytes(ours)
    assert "the run has gone on and not ended" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_report_with_another_scorer_is_told_as_it_is(run: Path, tmp_path: Path) -> None:
    summary = run / "report" / "summary.json"
    ours = summary.read_text()
    told = json.loads(ours)
    told["scorers"] = {
        "jpeg_compressibility": told["scorers"]["jpeg_compressibility"],
        "be|uty": {"before": 1, "after": 2},
    }
    try:
        summary.write_text(json.dumps(told))
        card = dry(run, tmp_path / "out")["README.md"].decode()
    finally:
        summary.write_text(ours)
    assert "| be\\|uty | only looked at | 1.000 | 2.000 |" in card and "brightness | only" not in card


def test_where_to_publish_may_change_on_resume(run: Path) -> None:
    tables = RunFolder(run).recipe_tables()
    assert resume_point(RunFolder(run), {**tables, "push": {"repo": "zoo/other"}}, resume=True) is not None


def test_a_hub_in_trouble_after_training_costs_nothing(
    online: Hub, tmp_path: Path, tiny_model: Path, bucket: str, capsys: pytest.CaptureFixture
) -> None:
    online.failing["/commit/"] = 503
    changes = {
        "guard": {"max_kl_nats": 1e-9, "on_alarm": "roll_back"},
        "push": {"repo": "zoo/rolled", "license": "mit"},
        "output_dir": f"{bucket}/runs",
    }
    recipe, run = recipe_file(tmp_path, tiny_model, **changes), f"{bucket}/runs/tiny"
    assert ddpo.main(["train", str(recipe), "--serial"]) == 3
    printed = capsys.readouterr()
    assert "the run is whole, and was not pushed: the hub answers 503: not today" in printed.err
    assert f"ddpo push {run} zoo/rolled" in printed.err and TOKEN not in printed.out + printed.err
    assert online.files("zoo/rolled") == {}
    online.failing.clear()
    assert ddpo.main(["push", run, "zoo/rolled"]) == 0
    files, name = online.files("zoo/rolled"), "pytorch_lora_weights.safetensors"
    best = RunFolder(run).best
    kept = json.loads(best.read("best.json"))
    assert files[name] == best.read(f"lora/{name}")  # the guard has put them in the run's place
    assert json.loads(files["summary.json"])["fingerprint"] == kept["fingerprint"]
    assert "The guard has ended the run at version 2" in files["README.md"].decode()
    assert "weights are those of version 0" in files["README.md"].decode()


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


@pytest.mark.parametrize(("environment", "push", "says"), REFUSED, ids=[says for _, _, says in REFUSED])
def test_what_will_not_be_taken_is_said_before_training(
    environment: dict,
    push: dict,
    says: str,
    online: Hub,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    online.repositories.setdefault("alice/open", Repository(private=False))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = {"repo": "alice/new", "license": "mit", **push}
    recipe = recipe_file(tmp_path, tiny_model, push={key: value for key, value in asked.items() if value is not None})
    before = set(online.repositories)
    assert ddpo.main(["train", str(recipe), "--serial"]) == 2
    printed = capsys.readouterr()
    token = os.environ["HF_TOKEN"]
    assert says in printed.err and not (token and token in printed.out + printed.err)
    assert set(online.repositories) == before and not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


@pytest.mark.parametrize("endpoint", ["whoami", "repos/create", "auth-check"])
def test_a_hub_that_does_not_answer_is_said_before_training(
    endpoint: str, online: Hub, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture
) -> None:
    online.failing[endpoint] = 500
    assert ddpo.main(["train", str(recipe_file(tmp_path, tiny_model)), "--serial"]) == 2
    assert "the hub answers 500" in capsys.readouterr().err and not (tmp_path / "runs/tiny/metrics.jsonl").exists()


def test_a_hub_that_never_answers_is_not_waited_for(
    run: Path, online: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(deploy.hub, "TIMEOUT_SECONDS", 0.2)
    with scripted(lambda _: time.sleep(1)) as (url, _):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert ddpo.main(["push", str(run), "alice/tiny"]) == 3
    assert "not pushed: the hub does not answer as it should: ReadTimeout" in capsys.readouterr().err


def test_nobody_there_is_exit_code_3_of_push(
    run: Path, online: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert ddpo.main(["push", str(run), "alice/tiny"]) == 3
    assert "not pushed: the hub does not answer" in capsys.readouterr().err


def test_a_whole_network_is_published_in_its_folder_and_loads(
    online: Hub, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = {"name": "stable_diffusion", "model": str(tiny_model), "train": "full"}
    changes: dict = {"policy": policy, "guard": {}, "evaluation": {"images": 2}, "rounds": 1}
    changes["push"] = {"repo": "zoo/full", "license": "mit"}
    assert ddpo.main(["train", str(recipe_file(tmp_path, tiny_model, **changes)), "--serial"]) == 0
    files, run = online.files("zoo/full"), tmp_path / "runs" / "tiny"
    assert {place for place in files if "/" in place} == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    card = files["README.md"].decode()
    assert "whole UNet" in card and "lora" not in ModelCard(card).data.to_dict()["tags"]
    assert "not evaluated while it trained" in card
    (program,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    space: dict = {}
    exec(compile(program, "card", "exec"), space)
    trained = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    assert all((space["unet"].state_dict()[name] == value).all() for name, value in trained.items())
    assert Image.open(io.BytesIO((tmp_path / "picture.png").read_bytes())).size == (16, 16)


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

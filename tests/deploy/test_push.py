"""ddpo push to a local hub: the uploaded files load, are the run's, and contain no token."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.resume import resume_point
from tests.hub_server import Hub, Repository
from tests.publishing import TOKEN, recipe_file, with_the_hub

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def said(served: tuple[str, Hub], folder: Path, tiny_model: Path) -> str:
    """`ddpo train` of a recipe with `[push]`, as a user types it: what it prints."""
    command = [sys.executable, "-m", "ray_ddpo", "train", recipe_file(folder, tiny_model), "--serial"]
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


def test_the_cards_program_samples_the_images_of_ddpo_sample(
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
    assert cli.main(["sample", "--lora", str(run), "--output", str(tmp_path / "ours"), "cat"]) == 0
    plain, ours = (
        np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("image.png", "ours/000-cat-seed0.png")
    )
    assert np.abs(plain - ours).max() <= 1 and plain.std() > 1


def dry(run: Path, folder: Path, *options: str) -> dict[str, bytes]:
    assert cli.main(["push", str(run), "alice/tiny", "--dry-run", str(folder), *options]) == 0
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_needs_no_token_and_writes_the_bytes_that_are_uploaded(
    run: Path, served: tuple[str, Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    asked = len(served[1].asked)
    assert dry(run, tmp_path / "out") == served[1].files("alice/tiny")
    assert len(served[1].asked) == asked
    assert cli.main(["push", str(run), "alice/tiny", "--dry-run", str(tmp_path / "out")]) == 2
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
    assert cli.main(["push", str(run), "zoo/best", *options]) == 0
    assert online.repositories["zoo/best"].private and online.files("zoo/best", "main") == {}
    uploaded = online.files("zoo/best", "best")
    assert uploaded[name] == best[name] and "'zoo/best'" in uploaded["README.md"].decode()
    assert "revision='best'" in uploaded["README.md"].decode()


def test_weights_of_an_earlier_push_do_not_stay(run: Path, online: Hub) -> None:
    earlier = {"unet/diffusion_pytorch_model.safetensors": b"old", "notes.txt": b"theirs", "README.md": b"old"}
    online.repositories["zoo/again"] = Repository(private=False, branches={"main": earlier})
    assert cli.main(["push", str(run), "zoo/again"]) == 0
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
        assert cli.main(["push", str(run), "alice/tiny", "--dry-run", str(tmp_path / "out")]) == 2
    finally:
        file.write_bytes(ours)
    assert "the run has gone on and not ended" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_report_with_another_scorer_is_reported_as_it_is(run: Path, tmp_path: Path) -> None:
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
    assert cli.main(["train", str(recipe), "--serial"]) == 3
    printed = capsys.readouterr()
    assert "training finished, but the upload failed: the hub answers 503: not today" in printed.err
    assert f"ddpo push {run} zoo/rolled" in printed.err and TOKEN not in printed.out + printed.err
    assert online.files("zoo/rolled") == {}
    online.failing.clear()
    assert cli.main(["push", run, "zoo/rolled"]) == 0
    files, name = online.files("zoo/rolled"), "pytorch_lora_weights.safetensors"
    best = RunFolder(run).best
    kept = json.loads(best.read("best.json"))
    assert files[name] == best.read(f"lora/{name}")  # the guard has put them in the run's place
    assert json.loads(files["summary.json"])["fingerprint"] == kept["fingerprint"]
    assert "The guard has ended the run at version 2" in files["README.md"].decode()
    assert "weights are those of version 0" in files["README.md"].decode()


def test_a_full_network_is_published_in_its_folder_and_loads(
    online: Hub, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = {"name": "stable_diffusion", "model": str(tiny_model), "train": "full"}
    changes: dict = {"policy": policy, "guard": {}, "evaluation": {"images": 2}, "rounds": 1}
    changes["push"] = {"repo": "zoo/full", "license": "mit"}
    assert cli.main(["train", str(recipe_file(tmp_path, tiny_model, **changes)), "--serial"]) == 0
    files, run = online.files("zoo/full"), tmp_path / "runs" / "tiny"
    assert {place for place in files if "/" in place} == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    card = files["README.md"].decode()
    assert "full network" in card and "lora" not in ModelCard(card).data.to_dict()["tags"]
    assert "not evaluated during training" in card
    (program,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    space: dict = {}
    exec(compile(program, "card", "exec"), space)
    trained = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    assert all((space["unet"].state_dict()[name] == value).all() for name, value in trained.items())
    assert Image.open(io.BytesIO((tmp_path / "image.png").read_bytes())).size == (16, 16)

"""Names from files or the user never lead outside the folder that they are for."""

import hashlib
import json
from pathlib import Path

import boto3
import numpy as np
import pytest
from safetensors.numpy import save

from ray_ddpo import cli
from ray_ddpo.common.policy_weights import pack
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RolloutsTable
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder, weights_here
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.commands.sample import _file_name
from ray_ddpo.learner.checkpoints.checkpoint import (
    MANIFEST,
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from ray_ddpo.learner.checkpoints.learner_state import LearnerState

OUTSIDE = ("../secret", "a/../../secret", "..", "/secret", "a/..", "//secret")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file beside the run's folder, which nothing in the run may reach."""
    path = tmp_path / "secret"
    path.write_bytes(save({"buffer": np.ones(2, np.float32)}))
    return path


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_a_storage(tmp_path: Path, secret: Path, name: str) -> None:
    before, storage = secret.read_bytes(), Storage(tmp_path / "run")
    storage.write("inside", b"")
    doings = [storage.read, storage.exists, storage.names, storage.remove, storage.folder]
    doings += [lambda name: storage.write(name, b"x"), lambda name: storage.create(name, b"x")]
    doings += [lambda name: storage.append(name, b"x"), lambda name: storage.copy_out(name, tmp_path / "copies")]
    for do in doings:
        with pytest.raises(ValueError, match="leads out of the folder"):
            do(name)
    assert secret.read_bytes() == before and storage.names() == ["inside"]


def test_a_name_with_dots_of_its_own_is_a_name(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("..a/b..c/...", b"x")
    assert storage.read("..a/b..c/...") == b"x"


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "a/b", "..", ".hidden", "a\n", "", "a b", "a\0b", "évil", "-rf", "~", "$HOME"]
)
def test_a_runs_name_is_the_name_of_one_folder(tables: dict, name: str) -> None:
    with pytest.raises(ValueError, match="name is"):
        Recipe.parse({**tables, "name": name})


@pytest.mark.parametrize("label", ["../x", "a/b", "a b", "a\n", "<b>", ""])
def test_a_rewards_label_is_a_word(tables: dict, label: str) -> None:
    with pytest.raises(ValueError, match=r"reward\.label is"):
        Recipe.parse({**tables, "reward": {"name": "jpeg_compressibility", "label": label}})


def committed(folder: Path) -> Storage:
    weights = pack(1, {"a.lora_A": np.zeros(2, np.float32)})
    learner = LearnerState(1, (weights,), {}, {})
    return save_checkpoint(Storage(folder / "checkpoints"), Checkpoint(1, learner, {}), keep=1)


@pytest.mark.parametrize("name", [*OUTSIDE, "../../secret", "", ".", "a\0b"])
def test_a_manifest_that_names_what_is_outside_makes_no_checkpoint(tmp_path: Path, secret: Path, name: str) -> None:
    checkpoint = committed(tmp_path)
    manifest = json.loads(checkpoint.read(MANIFEST)) | {name: hashlib.sha256(secret.read_bytes()).hexdigest()}
    checkpoint.write(MANIFEST, json.dumps(manifest).encode())
    assert newest_checkpoint(Storage(tmp_path / "checkpoints")) is None


@pytest.mark.parametrize("name", ["../../secret", "../../../secret"])
def test_a_checkpoint_reads_no_weights_from_outside(tmp_path: Path, secret: Path, name: str) -> None:
    checkpoint = committed(tmp_path)
    state = json.loads(checkpoint.read("state.json"))
    state["evaluation"] = {"files": {name: state["weights"][0]}, "pending": []}
    checkpoint.write("state.json", json.dumps(state).encode())
    with pytest.raises(ValueError, match="leads out of the folder"):
        load_checkpoint(checkpoint)


def test_an_object_whose_key_leads_out_is_copied_nowhere(bucket: str, tmp_path: Path) -> None:
    key = "runs/one/lora/../../../evil"
    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"x")
    with pytest.raises(ValueError, match="leads out of the folder"):
        Storage(f"{bucket}/runs/one").copy_out("lora", tmp_path / "copies")
    assert list(tmp_path.rglob("evil")) == []


def test_best_and_a_ledger_hold_only_what_their_names_allow(tmp_path: Path, secret: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for name in ("round=../secret", "round=000001x", "round=1/../../secret"):
        (tmp_path / "run" / "rollouts" / name.replace("/", "∕")).mkdir(parents=True)
    ledger = Ledger(folder.storage, RolloutsTable())
    ledger.cut(0)
    assert ledger.rounds() == [] and secret.exists()
    assert len(folder.rollouts.names()) == 3, "what is no round's folder is not touched"


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "/etc/passwd", "a\0b", "..", "a\\b", "x" * 500, "<script>", "a\nb"]
)
def test_a_prompt_makes_a_file_name_and_no_path(prompt: str) -> None:
    name = _file_name(prompt)
    assert len(name) <= 60 and all(letter == "_" or letter.isalnum() for letter in name)


@pytest.mark.parametrize("path", ["/etc/passwd/../nothing", "../../../nothing", "nothing\n", "."])
def test_a_file_of_prompts_that_is_none_is_said_and_a_list_has_no_path(
    tables: dict, path: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from ray_ddpo.deploy.driver.components import build_components

    with pytest.raises(ValueError, match=r"prompts\.path is .*there is no such file"):
        build_components(Recipe.parse({**tables, "prompts": {"name": "file", "path": path}})).prompts.load()
    with pytest.raises(ValueError, match=r"prompts\.name is"):
        build_components(Recipe.parse({**tables, "prompts": {"name": f"../{path}"}}))


def test_a_lora_is_taken_from_where_the_user_points_and_from_nowhere_else(
    bucket: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match="leads out of the folder"), weights_here(f"{bucket}/runs/.."):
        pass
    assert cli.main(["sample", "--lora", f"{bucket}/runs/..", "cat"]) == 2
    assert "Traceback" not in capsys.readouterr().err

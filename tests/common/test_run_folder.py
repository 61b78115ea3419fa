"""The run's folder: output paths, and its recipe when it is read back."""

import os
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder, weights_here
from tests.conftest import SECRET


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def remote(bucket: str) -> RunFolder:
    made = RunFolder(f"{bucket}/runs/one")
    made.create()
    return made


def test_an_output_dir_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    with pytest.raises(ValueError, match=f"output_dir: the run folder {path} cannot be written: Not a directory"):
        RunFolder(path).create()


@pytest.mark.parametrize(
    "bucket_name", ["s3://no-such-bucket-here", pytest.param("bucket", marks=pytest.mark.thorough)]
)
def test_an_object_store_that_cannot_be_written_is_named_without_a_key(
    bucket_name: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bucket_name == "bucket":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nobody listens
    location = f"{bucket if bucket_name == 'bucket' else bucket_name}/runs"
    with pytest.raises(ValueError, match=f"output_dir: the run folder {location} cannot be written: ") as error:
        RunFolder(location).create()
    assert SECRET not in str(error.value)


def test_making_a_folder_leaves_no_trace_of_the_trial(folder: RunFolder) -> None:
    assert os.listdir(folder.location) == []


@pytest.mark.parametrize("place", ["folder", "remote"])
def test_a_recipe_comes_back_from_its_file_as_it_was(place: str, request: pytest.FixtureRequest, tables: dict) -> None:
    folder = request.getfixturevalue(place)
    recipe = Recipe.parse({**tables, "trackers": [{"name": "tensorboard"}], "max_policy_lag": 1})
    folder.write_recipe(recipe.model_dump())
    assert folder.load_recipe([]) == recipe
    assert folder.load_recipe(["--rounds", "9"]).rounds == 9
    assert folder.recipe_tables()["policy"]["name"] == "stable_diffusion"


def test_a_folder_without_a_recipe_is_no_run(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=f"{folder.location} is no run's folder: it has no recipe.toml"):
        folder.load_recipe([])


@pytest.mark.parametrize("place", ["folder", "remote"])
def test_a_token_is_read_back_from_the_same_folder_only_and_leaves_nothing(
    place: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(place)
    with folder.token() as token:
        assert RunFolder(folder.location).has_token(token)
        assert not RunFolder(folder.location).has_token("another start's")
        assert not RunFolder(tmp_path / "a_disk_of_its_own").has_token(token)
    assert not folder.has_token(token) and folder.storage.names() == []
    with pytest.raises(ZeroDivisionError), folder.token():
        raise ZeroDivisionError
    assert folder.storage.names() == []


def test_the_recipes_head_says_which_versions_ran_it(folder: RunFolder, recipe: Recipe) -> None:
    import torch

    folder.write_recipe(recipe.model_dump())
    head = folder.storage.read("recipe.toml").decode().splitlines()
    assert f"# torch {torch.__version__}" in head and any(line.startswith("# ray-ddpo ") for line in head)


@pytest.mark.parametrize("place", ["folder", "remote"])
def test_output_paths_name_what_exists(place: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(place)
    folder.storage.write("metrics.jsonl", b"")
    folder.checkpoints.write("latest", b"")
    lines = {line.split()[0]: line.split()[1] for line in folder.output_paths().splitlines()}
    assert lines == {"metrics": f"{folder.location}/metrics.jsonl", "checkpoints": f"{folder.location}/checkpoints"}


def test_weights_in_an_object_store_come_to_this_machine_by_run_folder_and_file(remote: RunFolder) -> None:
    remote.lora.write("weights.safetensors", b"1")
    remote.checkpoints.write("round-000001/state.json", b"not wanted")
    with weights_here(remote.location) as path:
        assert [file.relative_to(path).as_posix() for file in path.rglob("*.*")] == ["lora/weights.safetensors"]
    with weights_here(remote.lora.location) as path:
        assert (path / "weights.safetensors").read_bytes() == b"1"
    with weights_here(f"{remote.lora.location}/weights.safetensors") as path:
        assert path.read_bytes() == b"1"


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_a_full_network_in_an_object_store_comes_to_this_machine(part: str, remote: RunFolder) -> None:
    remote.storage.write(f"{part}/model.safetensors", b"1")
    with weights_here(remote.location) as path:
        assert (path / part / "model.safetensors").read_bytes() == b"1"
    assert remote.output_paths().split() == [part, f"{remote.location}/{part}"]


def test_weights_on_a_disk_stay_where_they_are(folder: RunFolder) -> None:
    with weights_here(folder.location) as path:
        assert path == Path(folder.location)


@pytest.mark.parametrize("output_dir", ["s3://bucket/runs", "s3://bucket/runs/", "gs://bucket/runs"])
def test_an_output_dir_in_an_object_store_is_joined_as_a_uri_also_inside_a_job(
    output_dir: str, tables: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    expected = f"{output_dir.rstrip('/')}/tiny"
    assert Recipe.parse({**tables, "output_dir": output_dir}).run_path() == expected


def test_something_else_at_one_of_the_runs_paths_is_named_at_the_start(tmp_path: Path) -> None:
    for name, what in (
        ("rollouts", "is a file and must be a folder"),
        ("metrics.jsonl", "is a folder and must be a file"),
    ):
        folder = RunFolder(tmp_path / name / "run")
        folder.create()
        place = tmp_path / name / "run" / name
        place.touch() if name == "rollouts" else place.mkdir()
        with pytest.raises(ValueError, match=f"output_dir: {place} {what}: move it away"):
            folder.create()

"""Storage failures: a full disk, an object store that is down, and a folder taken over by another process."""

import errno
import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.filesystems import LocalFiles
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder, without_none
from ray_ddpo.common.run_storage.storage import Storage, StorageError
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.learner.checkpoints.checkpoint import newest_checkpoint
from tests.failure_page import assert_documented
from tests.refusing_store import RefusingStore, refusing_store
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import rounds_done, wait_until
from tests.system.drivers import Driver

ENDLESS = 100_000  # rounds
SMALL_FILE = 20_000  # bytes: the largest file that may be written where a limit stands for a full disk


@pytest.fixture
def store(bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RefusingStore]:
    """A store that can refuse, in front of the bucket's."""
    with refusing_store(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def after(seconds: float, act: Callable[[], object]) -> None:
    threading.Timer(seconds, act).start()


def fails(monkeypatch: pytest.MonkeyPatch, *names: str, times: int) -> None:
    """Let the first writes of files whose path has one of these names in it find no room."""
    left, original = dict.fromkeys(names, times), LocalFiles.put  # the second attempt comes at the round's end

    def put(files: LocalFiles, path: str, data: bytes, flag: int) -> None:
        for name in names:
            if name in path and left[name]:
                left[name] -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        original(files, path, data, flag)

    monkeypatch.setattr(LocalFiles, "put", put)


@pytest.mark.rotated(every=2, group="longest")
def test_what_a_disk_refuses_in_one_round_is_written_after_the_next(
    tables: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tables |= {"rounds": 6, "checkpoint": {"every": 1, "keep": 9}}
    tables["sampling"]["num_steps"] = 2
    calm = final_fingerprint(Recipe.parse({**tables, "name": "calm"}), serial=True)
    names = (
        "runs/tiny/metrics.jsonl",
        "rollouts/round=000003",
        "evaluations/version=000003",
        "checkpoints/round-000005",
    )
    fails(monkeypatch, *names, times=2)
    recipe = Recipe.parse({**tables, "evaluation": {"every": 3, "images": 4, "batch_size": 4}})
    assert final_fingerprint(recipe, serial=True) == calm
    said = capsys.readouterr().err
    assert said.count("not saved: ") == 3, said
    assert "No space left on device; it is tried again after the next round" in said
    folder = RunFolder(recipe.run_path())
    assert Ledger(folder.storage, recipe.rollouts).rounds() == list(range(6))
    assert [figures["policy_version"] for figures in EvalLog(folder.storage).entries()] == [0, 3, 6]
    assert EvalLog(folder.storage).read(3).num_rows == 4
    lines = folder.storage.read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(6))
    committed = [f"round-{rounds:06d}" for rounds in (2, 3, 6)]
    assert folder.checkpoints.names() == ["latest", *committed], "those of rounds 1, 4 and 5 were not written"


@pytest.mark.thorough
def test_a_disk_that_stays_full_ends_the_run_with_its_last_checkpoint(tables: dict, tmp_path: Path) -> None:
    tables |= {"rounds": ENDLESS, "checkpoint": {"every": 1}}
    recipe = Recipe.parse(tables)
    run = Path(recipe.run_path())
    driver = Driver(recipe, tmp_path, "--serial")
    wait_until(lambda: rounds_done(run) >= 2 or driver.process.poll() is not None, "the second round")
    resource.prlimit(driver.process.pid, resource.RLIMIT_FSIZE, (SMALL_FILE, resource.RLIM_INFINITY))
    exit_code = driver.ended()
    assert_documented("storage refuses for three rounds, such as a full disk", exit_code, driver.said())
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None
    rounds = int(newest.name.removeprefix("round-")) + 1
    assert f"the last good checkpoint is that of round {rounds - 1}" in driver.said()
    resumed = final_fingerprint(Recipe.parse({**tables, "rounds": rounds}), serial=True, resume=True)
    assert resumed == final_fingerprint(Recipe.parse({**tables, "rounds": rounds, "name": "calm"}), serial=True)


def test_a_full_disk_at_the_start_or_at_the_end(
    tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(without_none({**tables, "rounds": 1})))
    with monkeypatch.context() as full:
        fails(full, "recipe.toml", times=9)
        assert_documented(
            "storage refuses at the start", cli.main(["train", str(file), "--serial"]), capsys.readouterr().err
        )
    with monkeypatch.context() as full:
        full.setattr("ray_ddpo.common.diffusion.diffusers_policy.DiffusersPolicy.save", no_room)
        exit_code = cli.main(["train", str(file), "--serial"])
    assert_documented("storage refuses the trained weights at the end", exit_code, capsys.readouterr().err)
    assert cli.main(["train", str(file), "--serial", "--resume", "auto"]) == 0
    assert (tmp_path / "runs/tiny/lora/pytorch_lora_weights.safetensors").exists()


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_is_taken_over_in_the_middle_of_a_commit_is_left_alone(
    tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As a process finds it that was suspended there: the other one has cleared its half of a checkpoint away."""
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(without_none({**tables, "checkpoint": {"every": 1}})))
    folder, original = RunFolder(Path(tables["output_dir"]) / "tiny"), LocalFiles.put
    other = json.dumps({"host": "elsewhere", "pid": 1, "time": time.time(), "token": "of another"}).encode()

    def put(files: LocalFiles, path: str, data: bytes, flag: int) -> None:
        if "checkpoints/round-000001/" in path and "state.json" in path:
            Path(folder.location, "lease.json").write_bytes(other)
            files.remove(os.path.dirname(path))
        original(files, path, data, flag)

    monkeypatch.setattr(LocalFiles, "put", put)
    exit_code = cli.main(["train", str(file), "--serial"])
    assert_documented("another process took the run's folder over", exit_code, capsys.readouterr().err)
    assert folder.storage.read("lease.json") == other and newest_checkpoint(folder.checkpoints) is None


@pytest.mark.system
def test_an_object_store_that_is_down_for_seconds_is_asked_again(
    bucket: str, store: RefusingStore, capsys: pytest.CaptureFixture
) -> None:
    """Longer than the store's own library asks again, with 500 at first and then without a connection."""
    storage = Storage(f"{bucket}/run")
    store.status = 500
    after(4, store.hang_up)
    after(8, lambda: (setattr(store, "status", None), store.listen()))
    storage.write("file", b"1")
    assert store.refused > 1 and "file cannot be written" in capsys.readouterr().err
    assert storage.read("file") == b"1"


def test_what_waiting_cannot_cure_is_not_waited_for(bucket: str, store: RefusingStore) -> None:
    storage = Storage(f"{bucket}/run")
    store.status = 403
    began = time.monotonic()
    with pytest.raises(StorageError, match="run/file cannot be written") as error:
        storage.write("file", b"1")
    assert error.value.permanent and time.monotonic() - began < 15


@pytest.mark.thorough
def test_a_run_whose_object_store_refuses_ends_with_its_last_checkpoint_and_resumes(
    tables: dict,
    tmp_path: Path,
    bucket: str,
    store: RefusingStore,
    capsys: pytest.CaptureFixture,
) -> None:
    tables |= {"rounds": 5, "output_dir": f"{bucket}/runs", "checkpoint": {"every": 1}}
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(without_none(tables)))
    run = Storage(f"{bucket}/runs/tiny")

    def refuse_from_round_2() -> None:
        wait_until(lambda: run.exists("checkpoints/round-000002/manifest.json"), "round 2")
        store.status = 403

    thread = threading.Thread(target=refuse_from_round_2)
    thread.start()
    exit_code = cli.main(["train", str(file), "--serial"])
    thread.join()
    assert_documented("an object store refuses for good, as with 403", exit_code, capsys.readouterr().err)
    assert cli.main(["train", str(file), "--serial", "--resume", "auto"]) == 2, "it refuses still"
    assert_documented("storage refuses at the start", 2, capsys.readouterr().err)
    store.status = None
    run.remove("lease.json")  # it could not be removed, and names this process, which lives
    resumed = final_fingerprint(Recipe.parse(tables), serial=True, resume=True)
    assert resumed == final_fingerprint(Recipe.parse({**tables, "output_dir": str(tmp_path / "calm")}), serial=True)

"""Commands on a run's folder with one damaged file: one line with the file, exit code 2, no traceback."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.run_storage.run_folder import without_none
from tests.conftest import small_tables
from tests.failure_page import assert_documented

ROWS = "rollouts/round=000001/images.parquet"
LORA = "lora/pytorch_lora_weights.safetensors"
EVALUATED = "evaluations/version=000002/images.parquet"


@pytest.fixture(scope="module")
def whole_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run with evaluations."""
    folder = tmp_path_factory.mktemp("whole")
    evaluation = {"every": 1, "images": 2, "batch_size": 2, "saved_images": 2, "prompts": ["cat", "dog"]}
    tables = {**small_tables(tiny_model, folder), "evaluation": evaluation, "checkpoint": {"every": 1}}
    (folder / "recipe.toml").write_text(tomli_w.dumps(without_none(tables)))
    assert cli.main(["train", str(folder / "recipe.toml"), "--serial"]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def truncated(path: Path) -> None:
    """Leave half of it; of a text, with an end of line, for a last line without one is what a kill leaves."""
    text = b"\n" if path.suffix == ".jsonl" else b""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + text)


def not_utf8(path: Path) -> None:
    path.write_bytes(bytes(range(128, 256)) + b"\n")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_that_leads_out(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc")


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def another_shape(path: Path) -> None:
    path.write_bytes(b"[1, 2]\n")


DAMAGES = (truncated, not_utf8, a_folder, a_link_that_leads_out, another_shape)
WORDS = {
    "status": lambda run: ["status", run],
    "scale": lambda run: ["scale", run, "--samplers", "2"],
    "report": lambda run: ["report", run],
    "replay": lambda run: ["replay", run, "--round", "1"],
    "sample": lambda run: ["sample", "--lora", run, "cat", "--output", run.parent / "samples"],
    "evaluate": lambda run: ["evaluate", run, "--output", run.parent / "evaluation"],
    "push": lambda run: ["push", run, "a/b", "--dry-run", run.parent / "dry", "--push.license", "mit"],
}
READ = [  # which commands read which file before they sample
    ("recipe.toml", ("status", "scale", "report", "replay", "sample", "evaluate", "push")),
    ("metrics.jsonl", ("status", "report")),
    (ROWS, ("replay",)),
    (LORA, ("sample", "evaluate", "push")),
]


def said(capsys: pytest.CaptureFixture[str], verb: str, run: Path) -> tuple[int, str]:
    capsys.readouterr()
    exit_code = cli.main([str(word) for word in WORDS[verb](run)])
    return exit_code, capsys.readouterr().err


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("file", "verb"), [(file, verb) for file, verbs in READ for verb in verbs])
def test_a_damaged_file_is_named(
    file: str, verb: str, damage: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / file)
    exit_code, printed = said(capsys, verb, run)
    (line,) = [line for line in printed.splitlines() if line.startswith(f"ddpo {verb}: ")]
    assert exit_code == 2 and Path(file).name in line and "Traceback" not in printed, printed


SITUATIONS = [
    ("a file of a run is damaged", ROWS, truncated, "replay"),
    ("a run's recipe is not UTF-8", "recipe.toml", not_utf8, "status"),
    ("a folder or a link stands where a file of a run is expected", "metrics.jsonl", a_link_that_leads_out, "report"),
    ("a run has no metrics", "metrics.jsonl", Path.unlink, "report"),
]


@pytest.mark.parametrize(("situation", "file", "damage", "verb"), SITUATIONS, ids=[each[0] for each in SITUATIONS])
def test_what_is_documented_is_printed(
    situation: str,
    file: str,
    damage: Callable[[Path], object],
    verb: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(run / file)
    assert_documented(situation, *said(capsys, verb, run))


def test_a_damaged_checkpoint_is_named_where_its_weights_are_wanted(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncated(run / "checkpoints" / "round-000001" / "state.json")
    exit_code, printed = said(capsys, "replay", run)
    assert exit_code == 2 and "round-000001 is damaged" in printed


def test_an_error_of_the_file_system_is_one_line_with_the_path(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.parent / "samples").write_text("a file where a folder is expected")
    exit_code, printed = said(capsys, "sample", run)
    assert_documented("the file system refuses", exit_code, printed)
    assert str(run.parent / "samples") in printed


@pytest.mark.thorough
@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("damage", [*DAMAGES, a_link_to_itself])
def test_every_command_survives_every_damaged_file(
    damage: Callable[[Path], None], whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [EVALUATED, "evaluations.jsonl", "checkpoints/round-000002/state.json", ROWS, LORA]
    for file in files:
        for verb in ("report", "push"):
            shutil.rmtree(tmp_path, ignore_errors=True)
            run = Path(shutil.copytree(whole_run, tmp_path / "run"))
            damage(run / file)
            exit_code, printed = said(capsys, verb, run)
            assert exit_code in (0, 2) and "Traceback" not in printed, (file, verb, printed)

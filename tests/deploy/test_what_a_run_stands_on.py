"""A run records its model, prompts, rewards and user module; every verb refuses others by name."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training
from tests.altered_files import altered
from tests.conftest import small_tables
from tests.failure_page import assert_documented

USERS_MODULE = '''"""A user's own reward."""

from brightness_of_mine import scale


def bright(images, prompts, metadata):  # in [0, 1], as its size
    return [scale(image) for image in images]
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """A folder with a model, prompts, a user's module, a recipe and a run of one round made from them."""
    home = tmp_path_factory.mktemp("home")
    model = Path(shutil.copytree(tiny_model, home / "model"))
    (home / "prompts.txt").write_text("a zebra\na cat\n")
    (home / "reward_of_mine.py").write_text(USERS_MODULE)
    (home / "brightness_of_mine.py").write_text(
        "def scale(image):  # its mean, with the size\n    return float(image.mean())\n"
    )
    tables = small_tables(model, home) | {
        "name": "first",
        "rounds": 1,
        "prompts": {"name": "file", "path": str(home / "prompts.txt")},
        "reward": {"name": "function", "path": "reward_of_mine:bright"},
        "evaluation": {"images": 2, "batch_size": 2},
        "checkpoint": {"every": 1},
        "max_policy_lag": 1,  # so the checkpoint holds the weights of the round as well
    }
    (home / "recipe.toml").write_text(tomli_w.dumps(tables))
    sys.path.insert(0, str(home))
    run_training(Recipe.parse(tables), serial=True)
    yield home
    sys.path.remove(str(home))
    for name in ("reward_of_mine", "brightness_of_mine"):
        sys.modules.pop(name, None)


def called(home: Path, verb: str, capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    """The exit code of a verb on the run, and all that it printed."""
    run = str(home / "runs/first")
    arguments = {
        "resume": ["train", str(home / "recipe.toml"), "--serial", "--resume", "auto", "--rounds", "2"],
        "report": ["report", run],
        "replay": ["replay", run, "--round", "0"],
        "sample": ["sample", "--lora", run, "--output", str(home / "samples"), "a cat"],
        "evaluate": ["evaluate", run, "--output", str(home / "found")],
    }
    capsys.readouterr()
    code = cli.main([*arguments[verb], *words])
    return code, "".join(capsys.readouterr())


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("part", "verbs"),
    [
        ("unet", ("resume", "sample", "evaluate", "report", "replay")),
        ("vae", ("sample",)),
        ("text_encoder", ("resume",)),
    ],
)
def test_another_model_under_the_same_path_is_refused_by_name(
    home: Path, part: str, verbs: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    (file,) = (home / "model" / part).glob("*.safetensors")
    with altered(file):
        for verb in verbs:
            code, printed = called(home, verb, capsys)
            situation = "a run is resumed on another model" if verb == "resume" else "weights are used on another model"
            assert_documented(situation, code, printed)
            assert f"policy.model/{part} was " in printed and str(file.parent) in printed, verb
    assert not (home / "samples").exists() and not (home / "found").exists()


def test_another_schedule_or_tokenizer_is_refused_too(home: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        file = home / "model" / name
        text = file.read_text()
        file.write_text(text.rstrip("\n") + " \n")
        code, printed = called(home, "sample", capsys)
        file.write_text(text)
        assert code == 2 and f"policy.model/{name.partition('/')[0]} was " in printed


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("file", "part", "verbs"),
    [
        ("prompts.txt", "prompts.path", ("resume", "evaluate")),
        ("reward_of_mine.py", "reward.path of function", ("resume", "evaluate")),
        ("brightness_of_mine.py", "reward.path of function/brightness_of_mine", ("resume",)),
    ],
)
def test_other_prompts_or_an_edited_reward_are_refused_by_name(
    home: Path, file: str, part: str, verbs: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    with altered(home / file):
        for verb in verbs:
            code, printed = called(home, verb, capsys)
            situation = (
                "a run is resumed with other prompts, reward weights or an edited module"
                if verb == "resume"
                else "weights are judged with other prompts, reward weights or an edited module"
            )
            assert_documented(situation, code, printed)
            assert f"{part} was " in printed and str(home / file) in printed
        assert called(home, "sample", capsys, "--output", str(home / "allowed"))[0] == 0  # it needs neither


def test_who_names_another_reward_gets_it(home: Path, capsys: pytest.CaptureFixture) -> None:
    with altered(home / "reward_of_mine.py"):
        words = ("--reward.path", "reward_of_mine:bright", "--output", str(home / "asked_for"))
        assert called(home, "evaluate", capsys, *words)[0] == 0


def test_a_run_whose_fingerprints_are_missing_or_unreadable_is_refused_in_one_line(
    home: Path, capsys: pytest.CaptureFixture
) -> None:
    file = home / "runs/first/base.json"
    text = file.read_text()
    try:
        file.unlink()
        for verb in ("resume", "sample", "report"):
            assert_documented("base.json is missing in a run's folder", *called(home, verb, capsys))
        file.write_text('{"policy.model/unet": 7}')
        code, printed = called(home, "sample", capsys)
        assert code == 2 and f"{file} cannot be used" in printed
    finally:
        file.write_text(text)


def test_recipe_ledger_and_checkpoint_have_the_fingerprints(home: Path) -> None:
    folder = RunFolder(home / "runs/first")
    base = {name: part.sha256 for name, part in folder.base().items()}
    assert {"policy.model/unet", "policy.model/vae", "prompts.path", "reward.path of function"} <= base.keys()
    head = folder.storage.read("recipe.toml").decode()
    assert all(f"# {name} sha256 {digest}\n" in head for name, digest in base.items())
    newest = newest_checkpoint(folder.checkpoints)
    assert newest and {name: part.sha256 for name, part in load_checkpoint(newest).base.items()} == base
    file = parquet.ParquetFile(home / "runs/first/rollouts/round=000000/images.parquet")
    about = json.loads(file.schema_arrow.metadata[b"ray_ddpo"])
    assert {name: part["sha256"] for name, part in about["base"].items()} == base


def test_a_moved_run_resumes_with_model_and_prompts_at_other_paths(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(home, moved, ignore=shutil.ignore_patterns("*.py"))
    places = ["--policy.model", str(moved / "model"), "--prompts.path", str(moved / "prompts.txt")]
    where = ["--output_dir", str(moved / "runs"), *places]
    arguments = ["train", str(moved / "recipe.toml"), "--serial", "--resume", "auto", "--rounds", "2", *where]
    with altered(next((moved / "model/unet").glob("*.safetensors"))):
        assert cli.main(arguments) == 2
    assert "policy.model/unet was " in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert RunFolder(moved / "runs/first").base()["policy.model/unet"].path == str(moved / "model/unet")
    sample = ["sample", "--lora", str(moved / "runs/first"), "--output", str(moved / "samples"), "a cat"]
    assert cli.main([*sample, "--policy.model", str(home / "model")]) == 0


@pytest.mark.rotated(every=2, group="longest")
def test_weights_of_two_models_are_not_compared_unasked(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = Path(shutil.copytree(home / "model", tmp_path / "other"))
    changed = ["--policy.model", str(model), "--name", "second", "--output_dir", str(tmp_path)]
    with altered(next((model / "unet").glob("*.safetensors"))):
        assert cli.main(["train", str(home / "recipe.toml"), "--serial", *changed]) == 0
    runs, output = [str(home / "runs/first"), str(tmp_path / "second")], ["--output", str(tmp_path / "found")]
    capsys.readouterr()
    assert cli.main(["evaluate", *runs, *output]) == 2
    assert f"the run in {runs[1]} was made with other files" in capsys.readouterr().err
    assert cli.main(["evaluate", *runs, *output, "--recipe", f"{runs[0]}/recipe.toml"]) == 0
    assert f"{runs[1]}: policy.model/unet was " in capsys.readouterr().err

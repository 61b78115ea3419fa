"""ddpo doctor on inputs that fail in a run: a fault with the cause, exit code 1, no traceback, no "ok"."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.run_storage.run_folder import without_none
from tests.failure_page import assert_documented


def doctor(capfd: pytest.CaptureFixture[str], tables: dict, folder: Path, *words: str) -> tuple[int, str]:
    """The exit code of `ddpo doctor` on a recipe, and all that it printed."""
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(without_none(tables)))
    capfd.readouterr()
    exit_code = cli.main(["doctor", str(path), *words])
    captured = capfd.readouterr()
    return exit_code, captured.out + captured.err


def faults(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("fault")]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Write a user's module of a name that no other test has imported; its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> str:
        name = f"users_{abs(hash(request.node.nodeid))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.fixture(autouse=True)
def _on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cluster, whatever ran before in this process."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.shutdown()


FAULTS = [
    ("a reward's module is misspelt", "import_nothing:score", None, ["there is no module 'import_nothing'"]),
    ("a reward's function is misspelt", "tests.user_functions:brigthness", None, ["has no 'brigthness'"]),
    ("a reward's module cannot be imported", "", "import no_such_package\n", ["no_such_package"]),
    ("a reward's module is no Python", "", "def score(:\n", ["SyntaxError", ".py:1)"]),
    ("a reward's module ends the process", "", "import sys\nsys.exit(3)\n", ["SystemExit", ".py:2)"]),
    (
        "a reward raises",
        "",
        "def score(images, prompts, metadata):\n    return undefined\n",
        ["undefined", ".py:2, in score"],
    ),
    ("a reward has the wrong shape", "", "def score(images, prompts, metadata):\n    return 0\n", ["shape"]),
    ("a reward takes one argument", "", "def score(images):\n    return [0.0] * len(images)\n", ["argument"]),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[each[0] for each in FAULTS])
def test_a_reward_that_fails_is_a_fault_with_its_cause(
    fault: tuple[str, str, str | None, list[str]],
    tables: dict,
    tmp_path: Path,
    module: Callable[[str], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, path, text, words = fault
    reward = {"name": "function", "path": path or f"{module(text or '')}:score"}
    nowhere = {**tables["policy"], "model": "./none"}  # then nothing is sampled
    exit_code, printed = doctor(capfd, {**tables, "reward": reward, "policy": nowhere}, tmp_path)
    (line,) = [line for line in faults(printed) if " reward " in line]
    assert exit_code == 1 and all(word in line for word in words), printed
    assert "Traceback" not in printed


@pytest.mark.system
def test_a_reward_that_raises_is_named_with_file_and_line(
    tables: dict, tmp_path: Path, module: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    name = module("def score(images, prompts, metadata):\n    return prompts[7]\n")
    reward = {"name": "function", "path": f"{name}:score"}
    exit_code, printed = doctor(capfd, {**tables, "reward": reward}, tmp_path)
    assert_documented("`ddpo doctor`: a reward raises", exit_code, printed)
    assert f" at {tmp_path}/{name}.py:2, in score" in printed


def damaged(model: Path, folder: Path, name: str, change: Callable[[Path], object]) -> str:
    copy = folder / "damaged"
    shutil.copytree(model, copy)
    change(copy / name)
    return str(copy)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_utf8(path: Path) -> None:
    path.write_bytes(bytes(range(128, 256)))


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("model_index.json", Path.unlink),
    ("model_index.json", cut),
    ("model_index.json", not_utf8),
    ("unet/config.json", Path.unlink),
    ("unet/config.json", cut),
    ("unet/diffusion_pytorch_model.safetensors", Path.unlink),
    ("unet/diffusion_pytorch_model.safetensors", cut),
    ("vae/diffusion_pytorch_model.safetensors", cut),
    ("text_encoder/model.safetensors", cut),
    ("text_encoder/config.json", not_utf8),
    ("scheduler/scheduler_config.json", cut),
    ("tokenizer", shutil.rmtree),
]


@pytest.mark.thorough
@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(("name", "change"), DAMAGES, ids=[f"{name}-{change.__name__}" for name, change in DAMAGES])
def test_a_damaged_model_is_a_fault(
    name: str,
    change: Callable[[Path], object],
    tiny_model: Path,
    tables: dict,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tables["policy"]["model"] = damaged(tiny_model, tmp_path, name, change)
    exit_code, printed = doctor(capfd, tables, tmp_path)
    assert exit_code == 1 and faults(printed), printed
    assert "Traceback" not in printed and "ok       ratio" not in printed


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"\xff\xfe\x00cat", "cannot be read"), (b"\n", "has no prompts")]
)
def test_a_prompt_file_that_cannot_be_read_is_a_fault_that_names_it(
    content: bytes | None, words: str, tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    tables["prompts"] = {"name": "file", "path": str(tmp_path / "prompts.txt")}
    exit_code, printed = doctor(capfd, tables, tmp_path)
    (fault,) = faults(printed)
    assert exit_code == 1 and "prompts.txt" in fault and words in fault, printed


def test_a_prompt_function_that_raises_is_a_fault_with_file_and_line(
    tables: dict, tmp_path: Path, module: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    name = module("def sample(generator):\n    raise LookupError('no prompts today')\n")
    exit_code, printed = doctor(capfd, {**tables, "prompts": {"name": "function", "path": f"{name}:sample"}}, tmp_path)
    (fault,) = faults(printed)
    assert exit_code == 1 and "prompts" in fault and "no prompts today" in fault and ".py:2)" in fault


def test_a_model_of_the_hub_without_network_is_a_fault(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tables["policy"]["model"] = "nobody/nothing"
    exit_code, printed = doctor(capfd, tables, tmp_path)
    assert_documented("`ddpo doctor`: a model of the hub, without network", exit_code, printed)


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize(
    "words",
    [
        ("--policy.name", "nowhere:Family"),
        ("--policy.name", "json:JSONDecoder"),
        ("--policy.lora.target_modules", '["nothing"]'),
        ("--algorithm.name", "none"),
        ("--learner.micro_batch_size", "5"),
        ("--evaluation.prompts", '[""]', "--prompts.held_out_prompts", '["unicorn"]'),
        ("--output_dir", "/proc/none"),
        ("--runtime.device", "cuda"),
    ],
    ids=" ".join,
)
def test_a_recipe_that_a_run_would_refuse_is_a_fault(
    words: tuple[str, ...], tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exit_code, printed = doctor(capfd, tables, tmp_path, *words)
    assert exit_code == 1 and faults(printed) and "Traceback" not in printed, printed

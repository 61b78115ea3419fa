"""Any error of a role's constructor becomes one line: part, cause, and the place in the user's code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.recipe.registry import import_object
from ray_ddpo.common.role_loading import RoleNotStarted, loading, starting
from tests import user_functions

HERE = Path(__file__)


def raising(error: BaseException) -> Callable[[], Any]:
    def load() -> None:
        raise error

    return load


def said(load: Callable[[], Any]) -> str:
    with pytest.raises(RoleNotStarted) as caught, starting("sampler"), loading("policy.model is 'x'"):
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no 'x'"),
        AttributeError("x"),
        OSError(2, "not there"),
        KeyError("x"),
        RuntimeError("a\nb"),
        SystemExit(1),
    ],
)
def test_any_error_of_the_users_code_names_role_part_file_and_line(error: BaseException) -> None:
    text = said(raising(error))
    assert text.startswith(f"sampler: policy.model is 'x', which cannot be loaded: {type(error).__name__}: ")
    assert f"({HERE}:" in text


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_lack_of_memory_says_where_to_look(error: Exception) -> None:
    assert said(raising(error)).endswith("; ddpo plan shows what each role needs")


def test_an_error_written_for_the_user_passes_unchanged() -> None:
    text = said(lambda: import_object("tests.user_functions:nothing", "reward.path"))
    assert text == "reward.path is 'tests.user_functions:nothing': module 'tests.user_functions' has no 'nothing'"
    assert not hasattr(user_functions, "nothing")


def test_a_syntax_error_names_the_users_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("fine = 1\nif fine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert f"({tmp_path / 'broken_module.py'}:2)" in said(lambda: import_object("broken_module:score", "reward.path"))


def test_a_damaged_file_is_named_whatever_the_library_says(tmp_path: Path) -> None:
    (tmp_path / "unet.safetensors").write_bytes(b"\xff" * 100)
    weights = Weights(str(tmp_path), ("unet.safetensors",), "policy.model")

    def load() -> None:
        with loading("policy.model is 'x'", lambda: (weights,)):
            raise OSError("nothing that helps")

    with pytest.raises(ValueError, match="unet.safetensors is damaged .*: copy or download that file again"):
        load()

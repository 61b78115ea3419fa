"""ddpo doctor, plan and train on invalid model folders: one line with the cause, no traceback."""

import shutil
from pathlib import Path

import pytest
import ray
import tomli_w
import torch

from ray_ddpo import cli
from ray_ddpo.common.run_storage.run_folder import without_none
from tests.accepted_page import assert_refused
from tests.model_copies import change_json, change_weights, copied, renamed, weights_file, without
from tests.tiny_families import save_tiny_sdxl


def told(capfd: pytest.CaptureFixture[str], tables: dict, folder: Path, *words: str) -> tuple[int, str]:
    """The exit code of a command on a recipe, and all that it printed."""
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(without_none(tables)))
    capfd.readouterr()
    exit_code = cli.main([words[0], str(path), *words[1:]])
    captured = capfd.readouterr()
    return exit_code, captured.out + captured.err


@pytest.fixture(autouse=True)
def _on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.shutdown()


def failing_folders(model: Path, folder: Path) -> dict[str, tuple[Path, bool]]:
    """Of each situation a folder, and whether `ddpo plan` tells it."""

    def copy(name: str) -> Path:
        return copied(model, folder / name)

    found = {
        "a folder of another family": (save_tiny_sdxl(folder / "sdxl"), True),
        "a pipeline that no family trains": (copy("controlnet"), True),
        "a part of another class than the family knows": (copy("asymmetric"), True),
        "weights of a part are missing": (copy("missing"), False),
        "a LoRA was fused into a part and not unloaded before saving": (copy("fused"), False),
        "weights of a part are of another size": (copy("size"), False),
        "only .bin files": (copy("pickles"), True),
        "a git-LFS pointer instead of a file": (copy("pointer"), False),
        "a part's folder is missing": (copy("folder"), True),
    }
    change_json(found["a pipeline that no family trains"][0] / "model_index.json", _class_name="AnyControlNetPipeline")
    asymmetric = found["a part of another class than the family knows"][0]
    change_json(asymmetric / "model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"])
    change_weights(found["weights of a part are missing"][0], "text_encoder", without("q_proj.weight"))
    fused = found["a LoRA was fused into a part and not unloaded before saving"][0]
    change_weights(fused, "unet", renamed("to_q.", "to_q.base_layer."))
    change_weights(
        found["weights of a part are of another size"][0],
        "unet",
        lambda state: {**state, "conv_in.weight": torch.zeros(16, 9, 3, 3)},
    )
    pickles = found["only .bin files"][0]
    weights_file(pickles, "vae").rename(pickles / "vae" / "diffusion_pytorch_model.bin")
    pointer = weights_file(found["a git-LFS pointer instead of a file"][0], "text_encoder")
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    shutil.rmtree(found["a part's folder is missing"][0] / "tokenizer")
    return found


@pytest.mark.thorough
def test_doctor_plan_and_train_say_in_one_line_what_cannot_be_loaded(
    tables: dict, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for situation, (model, early) in failing_folders(tiny_model, tmp_path).items():
        given = {**tables, "policy": {**tables["policy"], "model": str(model)}}
        exit_code, printed = told(capfd, given, tmp_path, "doctor")
        faults = [line for line in printed.splitlines() if line.startswith("fault")]
        assert exit_code == 1 and any(str(model) in line for line in faults), printed
        assert_refused(situation, printed)
        if early:
            exit_code, printed = told(capfd, given, tmp_path, "plan")
            assert exit_code == 2, printed
            assert_refused(situation, printed)
        exit_code, printed = told(capfd, given, tmp_path, "train", "--serial", "--name", model.name)
        assert exit_code == 2, printed
        assert_refused(situation, printed)

"""On Ray every role reports its loaded files, and others are refused; earlier weights give the same bits."""

import os
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.train import run_training
from tests.altered_files import altered
from tests.failure_page import assert_documented
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import at_round, beside, processes_of


def typed(tables: dict[str, Any], folder: Path, *words: str) -> int:
    """The exit code of `ddpo train` on these tables."""
    (folder / "typed.toml").write_text(tomli_w.dumps(tables))
    return cli.main(["train", str(folder / "typed.toml"), *words])


@pytest.mark.system
@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("how", [(), ("--serial",)])
def test_a_role_with_another_file_than_the_others_is_refused_by_name(
    tables: dict, tmp_path: Path, how: tuple[str, ...], cluster: None, capsys: pytest.CaptureFixture
) -> None:
    elsewhere = Path(shutil.copytree(tables["policy"]["model"], tmp_path / "elsewhere"))
    tables["policy"] |= {"name": "tests.split_policy:OnTwoMachines", "elsewhere": str(elsewhere)}
    (file,) = (elsewhere / "unet").glob("*.safetensors")
    with altered(file):
        code = typed(tables, tmp_path, *how)
    printed = capsys.readouterr().err
    assert_documented("processes of a run have loaded different files", code, printed)
    assert (
        "policy.model/unet" in printed and "sampler" in printed and "learner" in printed and str(file.parent) in printed
    )


@pytest.mark.system
def test_on_ray_a_resume_checks_the_loaded_files_and_gives_the_same_bits(
    tables: dict, tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture
) -> None:
    model = Path(shutil.copytree(tables["policy"]["model"], tmp_path / "model"))
    tables |= {"checkpoint": {"every": 1}, "policy": {**tables["policy"], "model": str(model)}, "name": "first"}
    run_training(Recipe.parse({**tables, "rounds": 1}))
    with altered(next((model / "vae").glob("*.safetensors"))):
        code = typed(tables, tmp_path, "--resume", "auto")
    printed = capsys.readouterr().err
    assert_documented("a run is resumed on another model", code, printed)
    assert "policy.model/vae was " in printed and "(loaded by sampler 0)" in printed
    source = {"run": RunFolder(Path(tables["output_dir"]) / "first").location}
    second = tables | {"start_from": source, "reward": {"name": "jpeg_incompressibility"}}
    on_ray = final_fingerprint(Recipe.parse({**second, "name": "on_ray"}))
    assert on_ray == final_fingerprint(Recipe.parse({**second, "name": "serial"}), serial=True)


@pytest.mark.thorough
def test_who_takes_a_dead_ones_place_is_compared_with_the_others(
    tables: dict, tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture
) -> None:
    model = Path(shutil.copytree(tables["policy"]["model"], tmp_path / "model"))
    tables |= {"policy": {**tables["policy"], "model": str(model)}, "name": "replaced", "rounds": 500}
    with ExitStack() as changes:

        def change_and_kill() -> None:
            changes.enter_context(altered(next((model / "vae").glob("*.safetensors"))))
            (sampler,) = processes_of("ray::Sampler")
            os.kill(sampler.pid, signal.SIGKILL)

        with beside(at_round(Path(tables["output_dir"]) / "replaced", 1, change_and_kill)):
            code = typed(tables, tmp_path)
    printed = capsys.readouterr().err
    assert_documented("processes of a run have loaded different files", code, printed)
    assert "sampler 1 has loaded another policy.model/vae than sampler 0: " in printed

"""A NaN gradient on one of two ranks: the run ends in one line with complete files, and resumes."""

import math
from pathlib import Path

import pytest
import tomli_w
from safetensors.numpy import load_file

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from tests.failure_page import assert_documented
from tests.system.conftest import final_fingerprint

IN_ROUND_THREE = 6  # a round has two steps, and before the first one the family is tried


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_in_one_ranks_gradient_ends_the_run_with_complete_files(
    dtype: str, tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, cluster: None
) -> None:
    (tmp_path / "once").mkdir()
    own = {"name": "tests.failing_parts:OwnPolicy", "once": str(tmp_path / "once"), "poisons": IN_ROUND_THREE}
    tables |= {"rounds": 4, "policy": {**tables["policy"], **own, "dtype": dtype}}
    tables["learner"] |= {"world_size": 2, "micro_batch_size": 8}
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(tables))
    exit_code = cli.main(["train", str(file)])
    captured = capfd.readouterr()
    printed = captured.out + captured.err
    assert_documented("a gradient is not finite", exit_code, printed)
    assert "NotFinite: round 2, optimizer step " in printed, printed
    folder = RunFolder(Recipe.parse(tables).run_path())
    newest = newest_checkpoint(folder.checkpoints)
    assert newest is not None
    checkpoint = load_checkpoint(newest)
    assert checkpoint.rounds_done == 2
    kept = load_file(Path(folder.location) / "lora" / "pytorch_lora_weights.safetensors")
    assert all(math.isfinite(float(array.sum())) for array in (*kept.values(), checkpoint.learner.trained.buffer))
    recipe = Recipe.parse(tables)
    undisturbed = Recipe.parse({**tables, "name": "undisturbed"})
    assert final_fingerprint(recipe, resume=True) == final_fingerprint(undisturbed)

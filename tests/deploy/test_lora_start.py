"""`policy.lora.path`: a run starts from a LoRA, resumes to the same bits, and recognizes the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from ray_ddpo import cli
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings, read_weights
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from tests.accepted_page import assert_refused
from tests.altered_files import altered
from tests.conftest import small_tables
from tests.lora_forms import patterns


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a recipe that begins with a LoRA of several ranks and alphas."""
    home = tmp_path_factory.mktemp("start")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)
    path = patterns(pipeline, "stable_diffusion", home / "style")
    tables: dict[str, Any] = {**small_tables(tiny_model, home), "evaluation": {"images": 2, "batch_size": 2}}
    tables["policy"]["lora"] = {"path": str(path)}
    (home / "recipe.toml").write_text(tomli_w.dumps(tables))
    return home


def trained(home: Path, name: str, *words: str) -> int:
    return cli.main(["train", str(home / "recipe.toml"), "--name", name, *words])


def weights_of(home: Path, name: str) -> np.ndarray:
    newest = newest_checkpoint(RunFolder(home / "runs" / name).checkpoints)
    assert newest is not None
    return load_checkpoint(newest).learner.trained.buffer


@pytest.mark.thorough
def test_a_run_begins_with_the_file_resumes_to_the_same_bits_and_refuses_another_file(
    home: Path, tiny_model: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["plan", str(home / "recipe.toml")]) == 0
    assert trained(home, "whole", "--serial") == 0
    folder = RunFolder(home / "runs/whole")
    path = Path(folder.recipe_tables()["policy"]["lora"]["path"])
    assert folder.recipe_tables()["policy"]["lora"] == {"path": str(path)}
    assert "policy.lora.path" in folder.base()
    network = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    make_trainable(network, "lora", LoraSettings(path=str(path)))
    begun = read_weights(network, 0)
    recipe = Recipe.load(home / "recipe.toml")
    assert set(Ledger(folder.storage, recipe.rollouts).read(0).to_pydict()["fingerprint"]) == {begun.fingerprint}
    stored = load_file(path)
    assert all(
        torch.equal(torch.from_numpy(array.copy()), stored[f"unet.{name.replace('.default', '')}"])
        for name, array in begun.arrays().items()
    )
    assert trained(home, "halves", "--serial", "--rounds", "1") == 0
    with altered(path):
        assert trained(home, "halves", "--serial", "--resume", "auto") == 2
        assert_refused("a LoRA that training began with has changed at `--resume`", capsys.readouterr().err)
    assert trained(home, "halves", "--serial", "--resume", "auto") == 0
    assert np.array_equal(weights_of(home, "whole"), weights_of(home, "halves"))
    assert not np.array_equal(weights_of(home, "whole"), begun.buffer)


@pytest.mark.thorough
def test_what_is_called_pretrained_is_the_model_without_the_lora(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert trained(home, "still", "--serial", "--rounds", "1", "--learner.learning_rate", "1e-30") == 0
    run, few = str(home / "runs/still"), ["--output", str(home / "compared")]
    assert cli.main(["report", run]) == 0
    path = RunFolder(run).recipe_tables()["policy"]["lora"]["path"]
    assert cli.main(["evaluate", run, path, *few]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "→" in line]
    assert len(said) == 2 and said[0] == said[1], "the untrained run is the file, and neither is the pretrained model"
    assert "+0.0 %" not in said[0]
    assert trained(home, "further", "--serial", "--rounds", "1", "--from", run) == 0
    assert trained(home, "fresh", "--serial", "--from", run, "--policy.lora", "{rank=4}") == 2


@pytest.mark.thorough
def test_a_run_on_ray_begins_with_the_same_weights_and_ends_with_the_same(home: Path, cluster: None) -> None:
    assert trained(home, "one_process", "--serial", "--rounds", "1") == 0
    assert trained(home, "on_ray", "--rounds", "1") == 0
    assert np.array_equal(weights_of(home, "one_process"), weights_of(home, "on_ray"))

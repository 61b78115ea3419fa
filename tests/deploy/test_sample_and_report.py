"""A run's weights in `ddpo sample`, `ddpo report`, and plain diffusers, which samples the same images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_ddpo import cli
from ray_ddpo.actors.evaluation.eval_set import EvalSet
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report.numbers import number
from ray_ddpo.deploy.commands.report.report import summary
from ray_ddpo.deploy.evaluation.eval_result import EvalComparison
from ray_ddpo.train import run_training
from tests.conftest import SECRET


@pytest.fixture
def run(tables: dict) -> Path:
    recipe = Recipe.parse({**tables, "evaluation": {"images": 8, "batch_size": 4}})
    run_training(recipe, serial=True)
    return Path(recipe.run_path())


PLAIN_DIFFUSERS = """
import sys, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
model, lora, output = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
pipeline.load_lora_weights(lora)
for seed, prompt in [(3, "cat"), (4, "dog")]:
    images = pipeline(prompt, num_inference_steps=4, guidance_scale=3.0, eta=1.0,
                      generator=torch.Generator().manual_seed(seed)).images
    images[0].save(f"{output}/{seed}.png")
assert not any(name.partition(".")[0] in ("common", "actors", "learner") for name in sys.modules)
"""


@pytest.mark.parametrize("model", ["tiny", pytest.param("tiny_animals", marks=pytest.mark.thorough)])
def test_plain_diffusers_samples_the_images_of_ddpo_sample(model: str, tables: dict, tmp_path: Path) -> None:
    if model == "tiny_animals":
        tables["policy"] |= {"model": model}
    folder = EMBEDDED_MODELS.get(model, tables["policy"]["model"])
    recipe = Recipe.parse({**tables, "rounds": 1})
    run_training(recipe, serial=True)
    run = Path(recipe.run_path())
    ours = tmp_path / "ours"
    assert cli.main(["sample", "--lora", str(run), "--seed", "3", "--output", str(ours), "cat", "dog"]) == 0
    plain = tmp_path / "plain"
    plain.mkdir()
    arguments = [sys.executable, "-c", PLAIN_DIFFUSERS, folder, run / "lora", plain]
    subprocess.run(arguments, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    for name, seed in (("000-cat-seed3.png", 3), ("001-dog-seed4.png", 4)):
        one = np.asarray(Image.open(ours / name)).astype(int)
        other = np.asarray(Image.open(plain / f"{seed}.png")).astype(int)
        assert np.abs(one - other).max() <= 1
        assert one.std() > 1


def test_a_lora_file_alone_needs_a_recipe_and_samples_the_same(run: Path, tmp_path: Path) -> None:
    file = run / "lora" / "pytorch_lora_weights.safetensors"
    assert cli.main(["sample", "--lora", str(run), "--output", str(tmp_path / "a"), "fox"]) == 0
    arguments = ["--lora", str(file), "--recipe", str(run / "recipe.toml"), "--output", str(tmp_path / "b"), "fox"]
    assert cli.main(["sample", *arguments]) == 0
    assert (tmp_path / "a/000-fox-seed0.png").read_bytes() == (tmp_path / "b/000-fox-seed0.png").read_bytes()
    elsewhere = '--prompts={ name = "file", path = "not_here.jsonl" }'  # training prompts are not read
    assert cli.main(["sample", "--lora", str(run), "--output", str(tmp_path / "c"), elsewhere, "fox"]) == 0


def test_the_report_says_what_changed(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(run)]) == 0
    figures = json.loads((run / "report" / "summary.json").read_text())
    assert figures["images_compared"] == 8
    assert figures["reward_before"] != figures["reward_after"]
    printed = capsys.readouterr().out
    for name in ("report.html", "before_after.png", "reward_curve.png", "summary.json"):
        assert (run / "report" / name).is_file() and str(run / "report" / name) in printed
    assert len(np.unique(np.asarray(Image.open(run / "report" / "before_after.png")))) > 50


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("keep", [True, False])
def test_the_page_tells_of_every_reward_and_of_the_rows_that_were_kept(tables: dict, keep: bool) -> None:
    del tables["reward"]
    tables["rewards"] = [
        {"name": "jpeg_compressibility", "label": "small", "floor": -9.0},
        {"name": "jpeg_incompressibility", "label": "rich", "weight": 0.5},
    ]
    tables["prompts"] = {"name": "texts", "texts": ["cat", "<b>dog</b>"]}
    recipe = Recipe.parse({**tables, "evaluation": {"images": 4}, "rollouts": {"keep": keep}})
    run_training(recipe, serial=True)
    assert cli.main(["report", recipe.run_path()]) == 0
    page = (Path(recipe.run_path()) / "report" / "report.html").read_text()
    figures = json.loads((Path(recipe.run_path()) / "report" / "summary.json").read_text())
    assert {"small", "rich"} == set(figures["scorers"]) and "<b>small</b>" in page and "<b>rich</b>" in page
    assert f"{number(figures['reward_before'])} → {number(figures['reward_after'])}" in page
    assert ("round 0</th>" in page) == ("training images by prompt" in page) == keep
    assert "&lt;b&gt;dog&lt;/b&gt;" in page and "<b>dog" not in page


@pytest.mark.thorough
def test_a_run_of_one_round_in_a_bucket_has_its_page_there(tables: dict, bucket: str) -> None:
    tables |= {"output_dir": f"{bucket}/runs", "rounds": 1, "evaluation": {"images": 4}}
    recipe = Recipe.parse(tables)
    run_training(recipe, serial=True)
    assert cli.main(["report", recipe.run_path()]) == 0
    page = RunFolder(recipe.run_path()).report.read("report.html").decode()
    assert "in one round" in page and SECRET not in page and "testing-key" not in page


def test_an_untrained_run_changes_nothing(tables: dict) -> None:
    tables["learner"] |= {"learning_rate": 1e-30, "weight_decay": 0}
    recipe = Recipe.parse({**tables, "name": "still", "evaluation": {"images": 4}})
    run_training(recipe, serial=True)
    assert cli.main(["report", recipe.run_path()]) == 0
    figures = json.loads((Path(recipe.run_path()) / "report" / "summary.json").read_text())
    assert figures["reward_before"] == figures["reward_after"]


def test_the_figures_of_a_comparison_by_hand() -> None:
    before, after = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 6.0])
    named = {"before": np.array([1.0, 1.0, 0.0]), "after": np.array([1.0, 0.0, 1.0])}
    images = np.zeros((3, 8, 8, 3), np.uint8)
    comparison = EvalComparison(
        EvalSet((), (), 1),
        images,
        images,
        {"reward": before, "probe": named["before"]},
        {"reward": after, "probe": named["after"]},
    )
    figures = summary(comparison, ["probe"])
    assert figures["reward_before"] == 2 and figures["reward_after"] == pytest.approx(10 / 3)
    # Differences 1, 0, 3: deviation √(7/3), over √3.
    assert figures["paired_standard_error"] == pytest.approx((7 / 3) ** 0.5 / 3**0.5)
    assert figures["scorers"]["probe"] == {"before": pytest.approx(2 / 3), "after": pytest.approx(2 / 3), "kept": 0.5}

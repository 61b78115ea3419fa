"""What `ddpo plan` prints is what a run does, and what the lineage's tables say."""

from pathlib import Path

import pytest

import ddpo
from common.config import Recipe
from common.prompts import Animals
from common.schedule import round_tasks
from deploy.commands.plan import plan, plan_of
from deploy.composition import parts_of
from learner.learner import Learner

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"


def test_the_plan_of_a_small_recipe_is_what_its_parts_are(recipe: Recipe) -> None:
    numbers = plan_of(recipe)
    parts = parts_of(recipe)
    learner = Learner(parts.policy, parts.algorithm, recipe)
    assert numbers.broadcast_bytes == learner.weights()[-1].buffer.nbytes
    assert numbers.images == sum(len(task.seeds) for task in round_tasks(recipe, 0, Animals().load()))
    assert (numbers.tasks, numbers.optimizer_steps, numbers.transitions_per_step) == (2, 2, 16)
    assert numbers.forward_passes == 4


def test_a_trajectory_is_as_large_as_planned(recipe: Recipe) -> None:
    from actors.sampler import Sampler

    parts = parts_of(recipe)
    learner = Learner(parts.policy, parts.algorithm, recipe)
    sampler = Sampler(parts.policy, recipe.sampling, recipe.runtime)
    task = round_tasks(recipe, 0, Animals().load())[0]
    _, trajectory, _ = sampler.draw(task, learner.weights()[-1])
    planned = plan_of(recipe).trajectory_bytes * len(task.seeds)
    assert trajectory.num_bytes == pytest.approx(
        planned, rel=0.1
    )  # prompts may repeat within a task, and the empty one is there


def test_stable_diffusion_1_5_has_the_numbers_of_the_lineage() -> None:
    numbers = plan_of(Recipe.load(RECIPES / "sd15_aesthetic.toml"))
    assert numbers.sizes.network_parameters == 859_520_964
    assert numbers.sizes.trained_parameters == 797_184  # LoRA 4 on the attention's projections
    assert numbers.broadcast_bytes == 4 * 797_184
    assert numbers.images == 24 and numbers.optimizer_steps == 8
    # 51 latents of the path and the final ones, 4 × 64 × 64 float32; a prompt is 118 kB in half precision.
    assert numbers.trajectory_bytes == 52 * 4 * 64 * 64 * 4 + 50 * 12 + 77 * 768 * 2


def test_the_single_gpu_recipe_fits_the_gpu_it_names() -> None:
    recipe = Recipe.load(RECIPES / "sd15_aesthetic.toml")
    text, numbers = plan(recipe), plan_of(recipe)
    assert numbers.reward_worker_bytes == 2 * 303_966_208
    assert (
        14e9 < numbers.learner_bytes + numbers.sampler_bytes + numbers.reward_worker_bytes < 40e9
    )  # of the smaller A100
    assert "GPUs asked for" in text and "1 = learner 0.6 + samplers 0.3 + reward workers 0.1" in text


def test_the_command_prints_the_arithmetic(capsys: pytest.CaptureFixture) -> None:
    assert ddpo.main(["plan", str(RECIPES / "demo.toml"), "--sampling.batches_per_round", "2"]) == 0
    printed = capsys.readouterr().out
    assert "32 = 2 tasks × 16" in printed
    assert "128 = 16 images × 8 of 15 steps, in micro-batches of 32" in printed


def test_neighbouring_steps_share_their_latents_also_where_the_last_are_left_out(recipe: Recipe) -> None:
    whole = plan_of(recipe)
    early = plan_of(
        recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"untrained_last_steps": 1})})
    )
    channels, height, width = whole.sizes.latent_shape
    assert whole.trajectory_bytes - early.trajectory_bytes == channels * height * width * 4 + 12

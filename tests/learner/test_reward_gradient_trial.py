"""A user's differentiable reward is tried with gradients before the first round, in every way that a run can start."""

import dataclasses
import json
from pathlib import Path

import pytest
import tomli_w
import torch

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.doctor.doctor import restart_finding
from ray_ddpo.deploy.commands.doctor.ratio_measurement import sample_some, score_again
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.optimization.optimizer_steps import NotFinite
from tests.failure_page import assert_documented
from tests.faulty_gradients import redness
from tests.rounds import components_with, learner_of, sample_round


def own_tables(tables: dict, path: str, **more: object) -> dict:
    """Return the small recipe with a user's differentiable function, or class."""
    own = {"name": f"tests.faulty_gradients:{path}"}
    if path[0].islower():
        own = {"name": "function", "path": f"tests.faulty_gradients:{path}", "differentiable": True}
    return {
        **tables,
        "sampling": {**tables["sampling"], "backprop_steps": 1},
        "reward": own,
        "algorithm": {"name": "draft"},
        "learner": {**tables["learner"], "micro_batch_size": 4},
        **more,
    }


def load(tables: dict) -> Learner:
    components = components_with(tables)
    return Learner(components.policy, components.algorithm, components.recipe)


@pytest.mark.parametrize("path", ["redness", "flat_when_dark"])
def test_a_reward_with_a_gradient_is_taken(path: str, tables: dict) -> None:
    load(own_tables(tables, path))


ALLOWED = r"expected a tensor of shape \(4,\) of finite floating numbers with a gradient"


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("path", "came"),
    [
        ("through_numpy", rf"raised RuntimeError: Can't call numpy\(\).*faulty_gradients.py:\d+.*{ALLOWED}"),
        ("in_place", rf"raised RuntimeError: a leaf Variable.*{ALLOWED}"),
        ("detached", rf"returned numbers without a gradient: {ALLOWED}"),
        ("array", rf"returned ndarray: {ALLOWED}"),
        ("listed", rf"returned list: {ALLOWED}"),
        ("column", rf"returned torch.float32 of shape \(4, 1\): {ALLOWED}"),
        ("infinite", rf"returned \[inf, inf, inf, inf\] for 4 images of noise: {ALLOWED}"),
        ("infinite_slope", "has a gradient with respect to the images that is NaN or infinite for 4 images of noise"),
        ("of_parameter", rf"has no gradient with respect to the images for 4 images of noise: {ALLOWED}"),
        ("rounded", rf"has a gradient of 0 with respect to the images for 4 images of noise: {ALLOWED}"),
    ],
)
def test_a_function_that_cannot_be_learned_from_is_named_with_what_came(path: str, came: str, tables: dict) -> None:
    with pytest.raises(ValueError, match=rf"^reward.path = 'tests.faulty_gradients:{path}'.* ?{came}"):
        load(own_tables(tables, path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("OwnRedness", rf"^OwnRedness returned torch.float32 of shape \(4, 3\): {ALLOWED}"),
        ("OwnUnloadable", r"^OwnUnloadable.load_differentiable raised KeyError: 'weights' \(.*faulty_gradients.py:\d+"),
    ],
)
def test_a_class_of_ones_own_is_tried_too(path: str, message: str, tables: dict) -> None:
    with pytest.raises(ValueError, match=message):
        load(own_tables(tables, path))


def test_the_doctor_tries_it(tables: dict) -> None:
    recipe = Recipe.parse(own_tables(tables, "of_parameter"))
    with pytest.raises(ValueError, match=r"^reward.path = 'tests.faulty_gradients:of_parameter' has no gradient"):
        score_again(recipe, sample_some(recipe))
    recipe = Recipe.parse(own_tables(tables, "redness"))
    assert len(score_again(recipe, sample_some(recipe)).comparisons)


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("sampling", [{}, {"deterministic": True}, {"sde_window": 1}], ids=str)
def test_the_doctor_restarts_the_samplers_images(sampling: dict, tables: dict) -> None:
    tables = own_tables(tables, "redness")
    recipe = Recipe.parse({**tables, "sampling": {**tables["sampling"], **sampling}})
    sampled = sample_some(recipe)
    levels = score_again(recipe, sampled).restart_levels
    assert levels is not None and levels < 0.01
    assert restart_finding(levels, 1.0).level == "ok"
    moved = dataclasses.replace(sampled.as_stored, start_latents=sampled.as_stored.start_latents * 0.5)
    levels = score_again(recipe, dataclasses.replace(sampled, as_stored=moved)).restart_levels
    assert levels is not None and levels > 1
    found = restart_finding(levels, 1.0)
    assert found.level == "fault" and "and 1 are accepted" in found.found


def train(tables: dict, folder: Path, capfd: pytest.CaptureFixture, *options: str) -> tuple[int, str]:
    file = folder / "recipe.toml"
    file.write_text(tomli_w.dumps(tables))
    exit_code = cli.main(["train", str(file), *options])
    captured = capfd.readouterr()
    return exit_code, captured.out + captured.err


FAILURES = {
    "detached": "a differentiable reward returns something without a gradient",
    "of_parameter": "no gradient of a differentiable reward reaches the images",
    "through_numpy": "a differentiable reward raises with gradients on",
}


@pytest.mark.parametrize(
    "options", [("--serial",), pytest.param((), marks=pytest.mark.system)], ids=["one process", "Ray"]
)
@pytest.mark.parametrize("path", FAILURES)
def test_a_run_does_not_begin(
    path: str, options: tuple[str, ...], tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    exit_code, printed = train(own_tables(tables, path), tmp_path, capfd, *options)
    assert_documented(FAILURES[path], exit_code, printed)
    assert not (Path(tables["output_dir"]) / tables["name"] / "recipe.toml").exists()


def test_a_gradient_that_is_not_finite_at_the_first_step_is_the_rewards(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    tables = own_tables(tables, "infinite_slope_of_two")
    tables["learner"] |= {"micro_batch_size": 2}
    exit_code, printed = train(tables, tmp_path, capfd, "--serial")
    assert_documented("a reward's gradient is not finite before any step", exit_code, printed)
    assert "optimizer step 1 of 2" in printed and "learning_rate" not in printed.split("NotFinite")[1]


def test_after_a_step_it_may_be_the_learning_rates(tables: dict) -> None:
    components = components_with(own_tables(tables, "redness"))
    learner = learner_of(components)
    taken = sample_round(components, learner.weights()[-1])
    calls = []

    def poisoned(images, prompts, metadata):
        calls.append(images.requires_grad)
        return redness(images, prompts, metadata) * (torch.nan if sum(calls) == 2 else 1.0)

    learner._algorithm._loaded["function"] = (1.0, poisoned)
    with pytest.raises(NotFinite, match=r"optimizer step 2 of 2: the loss \(reward\) is not.*rate = 0.001 is too high"):
        learner.update(taken.batch, *taken.trajectories)


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("margin", [-100.0, 1000.0])
def test_a_margin_below_every_reward_is_said(
    margin: float, tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    tables = own_tables(tables, "redness", algorithm={"name": "refl", "margin": margin}, rounds=1)
    exit_code, printed = train(tables, tmp_path, capfd, "--serial")
    if margin > 0:
        assert exit_code == 0 and "algorithm.margin" not in printed
        return
    assert_documented("no image has a loss, because the margin is below every reward", exit_code, printed)
    metrics = json.loads((Path(tables["output_dir"]) / "tiny" / "metrics.jsonl").read_text())
    assert f"smallest of which is {metrics['learner/reward_min']:.4g}:" in printed
    assert metrics["optimizer_steps_skipped"] == metrics["optimizer_steps"] == 2


@pytest.mark.parametrize(
    "options", [("--serial",), pytest.param((), marks=pytest.mark.system)], ids=["one process", "Ray"]
)
def test_other_images_of_the_learner_end_a_run_in_one_line(
    options: tuple[str, ...], tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    tables = own_tables(tables, "redness")
    # Rounding moves few of an image's pixels to the next grey level, on each processor others: take many pixels.
    tables["policy"] |= {"sampler_dtype": "bfloat16", "resolution": 96}
    tables["sampling"] |= {"guidance_scale": 30.0}
    tables["algorithm"] |= {"restart_tolerance": 1e-6}
    tables["learner"] |= {"log_prob_tolerance": 1e3}
    exit_code, printed = train(tables, tmp_path, capfd, *options)
    assert_documented("sampler and learner make different images with a reward's gradient", exit_code, printed)

"""Training trajectories without noise: their bits, the proof of which weights sampled them, and clear refusals."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ddpo import cli
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.network_calls import calls_per_image
from ray_ddpo.common.diffusion.rollout import evaluation_window, sample_trajectories, score
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import round_tasks, sde_window_of_round
from ray_ddpo.train import run_training
from tests.rounds import components_with, learner_of, moved, sampler_of
from tests.tiny_families import MAKERS, policy_table
from tests.tiny_policy import scatter

STEPS, PROMPTS, SEEDS = 6, ["a cat", "a dog", "a cow"], [3, 4, 5]
WAYS: list[dict[str, Any]] = [{}, {"solver": "dpmsolver++"}, {"cache_interval": 2}]


@pytest.fixture(scope="module", params=["stable_diffusion", "sd3"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiffusersPolicy:
    model = MAKERS[request.param](tmp_path_factory.mktemp("model"))
    loaded = build(POLICIES, policy_table(request.param, model), "policy").load("cpu", sampling(), "sampler")
    scatter(loaded.network)
    return loaded


def sampling(**changes: Any) -> SamplingTable:
    return SamplingTable(**{"num_steps": STEPS, "guidance_scale": 3.0, "eta": 0.7, **changes})


def calls_while_sampling(policy: DiffusersPolicy, *args: Any) -> tuple[int, Any]:
    calls: list[int] = []
    handle = policy.network.register_forward_pre_hook(lambda *given: calls.append(1))
    sampled = sample_trajectories(policy, PROMPTS, SEEDS, *args)
    handle.remove()
    return len(calls), sampled


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_training_images_are_the_deterministic_ones_with_no_more_network_calls(
    policy: DiffusersPolicy, way: dict[str, Any]
) -> None:
    _, held_out = calls_while_sampling(policy, sampling(**way), range(0))
    calls, trained = calls_while_sampling(policy, sampling(deterministic=True, **way), range(1))
    assert torch.equal(trained.final_latents, held_out.final_latents)
    assert calls == (4 if "cache_interval" in way else STEPS)
    assert trained.steps.tolist() == [[0]] * 3 and trained.log_probs.isfinite().all()
    assert evaluation_window(sampling(deterministic=True, **way)) == range(0)


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_step_aside_proves_the_weights_as_a_stochastic_first_step_does(
    policy: DiffusersPolicy, way: dict[str, Any]
) -> None:
    keys = {"latents_dtype": "bfloat16", **way}
    sampled = sample_trajectories(policy, PROMPTS, SEEDS, sampling(deterministic=True, **keys), range(1))
    noisy = sample_trajectories(policy, PROMPTS, SEEDS, sampling(**keys), range(1))
    for name in ("steps", "latents", "next_latents", "log_probs"):
        assert torch.equal(getattr(sampled, name), getattr(noisy, name)), name
    assert torch.equal(score(policy, sampled), sampled.log_probs)
    assert not torch.equal(sampled.final_latents, noisy.final_latents)


def test_doctors_measurement_has_the_same_step(policy: DiffusersPolicy) -> None:
    sampled = sample_trajectories(policy, PROMPTS, SEEDS, sampling(deterministic=True))
    assert sampled.steps.tolist() == [[0]] * 3
    assert torch.equal(score(policy, sampled), sampled.log_probs)


DETERMINISTIC = {"sampling__num_steps": STEPS, "sampling__deterministic": "true", "learner__micro_batch_size": 4}


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("name", ["rwr", "rwr_sparse", "diffusion_nft"])
def test_a_run_trains_on_deterministic_images_and_is_replayed(
    tables: dict, name: str, capsys: pytest.CaptureFixture
) -> None:
    tables |= {
        "checkpoint": {"every": 1, "keep": 3},
        "algorithm": {"name": name},
        "prompts": {"name": "animals", "images_per_prompt": 2},
    }
    components = components_with(tables, **DETERMINISTIC)
    recipe = components.recipe
    assert sde_window_of_round(recipe, 0) == range(1) and calls_per_image(recipe, range(1)) == STEPS
    assert [task.window for task in round_tasks(recipe, 1, components.prompts.load())] == [range(1)] * 2
    run_training(recipe, serial=True)
    folder = RunFolder(recipe.run_path())
    metrics = [json.loads(line) for line in Path(folder.location, "metrics.jsonl").read_text().splitlines()]
    assert [row["log_prob_check/max_abs"] for row in metrics] == [0.0, 0.0]
    assert cli.main(["replay", folder.location, "--round", "1"]) == 0, capsys.readouterr()


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    "keys",
    [
        {"sampling__deterministic": "true"},
        {"sampling__sde_window": 2, "sampling__sde_window_order": "sliding", "sampling__skip_first_steps": 1},
    ],
    ids=["deterministic", "sliding window"],
)
def test_tasks_have_the_same_bits_on_one_sampler_and_on_two(tables: dict, keys: dict[str, Any]) -> None:
    tables |= {"algorithm": {"name": "rwr"}} if "sampling__deterministic" in keys else {}
    components = components_with(tables, sampling__num_steps=STEPS, learner__micro_batch_size=4, **keys)
    weights = moved(learner_of(components).weights()[-1])
    one, *two = (sampler_of(components) for _ in range(3))
    tasks = [
        dataclasses.replace(task, policy_version=0)
        for task in round_tasks(components.recipe, 1, components.prompts.load())
    ]
    in_turn = [one.sample(task, weights)[0].image_fingerprints for task in tasks]
    apart = [sampler.sample(task, weights)[0].image_fingerprints for sampler, task in zip(two, tasks, strict=True)]
    assert in_turn == apart and len(set(in_turn[0] + in_turn[1])) == 8


def test_a_resumed_run_ends_with_the_same_weights(tables: dict) -> None:
    tables |= {"algorithm": {"name": "rwr"}, "checkpoint": {"every": 1, "keep": 3}}
    straight = components_with({**tables, "name": "straight"}, **DETERMINISTIC).recipe
    run_training(straight, serial=True)
    halted = components_with({**tables, "name": "halted", "rounds": 1}, **DETERMINISTIC).recipe
    run_training(halted, serial=True)
    longer = components_with({**tables, "name": "halted"}, **DETERMINISTIC).recipe
    run_training(longer, serial=True, resume=True)
    checkpoints = [sorted(RunFolder(each.run_path()).checkpoints.names())[-1] for each in (straight, longer)]
    assert checkpoints[0] == checkpoints[1]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "sampling.deterministic is True, and DDPOImportanceSampling learns from the log-probs of all steps"),
        (
            {"sampling__sde_window": 2},
            "deterministic is true and sde_window 2: a deterministic trajectory has no stoch",
        ),
        ({"sampling__sde": "cps", "algorithm__name": "rwr"}, "deterministic is true and sde 'cps': a deterministic"),
        ({"sampling__shared_prefix": "true", "algorithm__name": "rwr"}, "shared_prefix is true and there is no sde_wi"),
    ],
)
def test_what_cannot_be_deterministic_is_refused(tables: dict, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        components_with(tables, **{**DETERMINISTIC, **keys})

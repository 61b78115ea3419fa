"""How a role's network runs: CUDA graphs by default on a GPU, refused or left out where they cannot work."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.diffusion.execution import records_graphs, set_up_execution
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.plan.numbers import plan_of
from ray_ddpo.deploy.commands.plan.plan import plan
from ray_ddpo.learner.learner import Learner
from tests.accepted_page import assert_refused
from tests.rounds import components_with
from tests.tiny_policy import tiny_policy


class OwnFamily(StableDiffusion):
    """A user's family."""


def records(device: str = "cuda", is_recomputed: bool = False, own: bool = False, **keys: Any) -> bool:
    config = (OwnFamily if own else StableDiffusion)(model="tiny_animals", **keys)
    return records_graphs(config, device, is_recomputed)


def test_auto_records_on_a_gpu_what_can_be_recorded() -> None:
    assert records() and records(device="cuda:1")
    assert not records(device="cpu")
    assert not records(is_recomputed=True) and not records(is_recomputed=True, cuda_graphs=True)
    assert not records(train="full") and records(train="full", cuda_graphs=True)
    assert not records(own=True) and records(own=True, cuda_graphs=True)
    assert not records(cuda_graphs=False)


@pytest.mark.parametrize("required", [True, "auto"])
@pytest.mark.parametrize("is_recomputed", [True, False])
def test_required_graphs_that_recomputation_prevents_are_told_in_one_line(
    required: bool | str,
    is_recomputed: bool,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys: Any = {"cuda_graphs": required, "gradient_checkpointing": "auto"}
    policy, recorded = tiny_policy(tiny_model, "learner"), []
    monkeypatch.setattr(policy, "device", "cuda")
    monkeypatch.setattr(policy, "record_graphs", lambda: recorded.append(True))
    if is_recomputed:
        policy.network.enable_gradient_checkpointing()
    capsys.readouterr()
    set_up_execution(StableDiffusion(model="tiny_animals", **keys), policy, "learner", 2)
    captured = capsys.readouterr()
    printed = (captured.out + captured.err).splitlines()
    assert bool(recorded) is not is_recomputed
    if required is True and is_recomputed:
        (line,) = printed
        assert "policy.cuda_graphs: the learner re-computes its activations" in line and "is 'auto'" in line
    else:
        assert printed == []


@pytest.mark.rotated(every=2, group="longest")
def test_the_plan_counts_what_recordings_keep_on_a_gpu_alone(tables: dict) -> None:
    on_gpu = tables | {"samplers": {"num_gpus": 1}}
    numbers = plan_of(Recipe.parse(on_gpu))
    assert numbers.graph_bytes == round(4 * numbers.sizes.sampling.each) > 0
    assert "CUDA graphs" in plan(Recipe.parse(on_gpu))
    for policy in ({"cuda_graphs": False}, {"compile": "sampler"}):
        assert plan_of(Recipe.parse(on_gpu | {"policy": tables["policy"] | policy})).graph_bytes == 0
    assert plan_of(Recipe.parse(tables)).graph_bytes == 0 and "CUDA graphs" not in plan(Recipe.parse(tables))


@pytest.mark.parametrize(
    ("keys", "situation"),
    [
        ({"compile": "sampler"}, "`policy.cuda_graphs = true` beside a compiled network"),
        ({"gradient_checkpointing": True}, "`policy.cuda_graphs = true` beside gradient checkpointing"),
    ],
)
def test_graphs_that_cannot_be_recorded_are_refused(keys: dict, situation: str) -> None:
    with pytest.raises(ValidationError) as error:
        StableDiffusion(model="tiny_animals", cuda_graphs=True, **keys)
    assert_refused(situation, str(error.value))
    StableDiffusion(model="tiny_animals", cuda_graphs="auto", **keys)


def test_graphs_that_are_required_are_refused_on_the_cpu_before_anything_is_loaded(tables: dict) -> None:
    components = components_with(tables, policy__cuda_graphs="true")
    recipe = components.recipe
    for make in (
        lambda: Sampler(components.policy, recipe.sampling, recipe.runtime),
        lambda: Learner(components.policy, components.algorithm, recipe),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert_refused("`policy.cuda_graphs = true` for a role on the CPU", str(error.value))

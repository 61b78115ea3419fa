"""Compiled networks are compiled while a role starts, which is printed, and reference passes have the loss's graph."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.diffusion import diffusers_policy
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.learner.drift import kl_subset, reference_kl
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.round_data.reference_passes import log_probs_under
from ray_ddpo.learner.round_data.transitions import indices_of, micro_batches, optimizer_steps, round_transitions
from tests.accepted_page import assert_refused
from tests.rounds import components_with, learner_of, sample_round

OWN = {"algorithm__off_policy__ratio": "proximal", "learner__micro_batch_size": 4}


class NotCompiled:
    """A network in place of a compiled one. It rounds otherwise without gradients, as another compiled graph does."""

    calls: list[tuple[int, bool]] = []  # rows, and whether gradients were on

    def __init__(self, call: Callable[..., Tensor], rows: int, blocks: Iterable[nn.Module] = ()) -> None:
        self._call = call

    def __call__(self, **inputs: Tensor) -> Tensor:
        self.calls.append((len(inputs["latents"]), torch.is_grad_enabled()))
        output = self._call(**inputs)
        return output if torch.is_grad_enabled() else output * 1.01


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(diffusers_policy, "CompiledNetwork", NotCompiled)
    NotCompiled.calls.clear()
    return NotCompiled.calls


def test_a_sampler_compiles_for_a_tasks_rows_while_it_starts(
    tables: dict, calls: list[tuple[int, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    components = components_with(tables, policy__compile="sampler")
    Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)
    assert calls == [(8, False)]  # 4 images, with and without the prompt
    printed = capsys.readouterr().out
    assert "compiling the sampler's network (first on this machine; the others take its cache) …" in printed
    assert "compiled the sampler's network in " in printed
    Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)
    assert "from this machine's cache" in capsys.readouterr().out
    eager = components_with(tables)
    Sampler(eager.policy, eager.recipe.sampling, eager.recipe.runtime)
    assert len(calls) == 2 and capsys.readouterr().out == ""


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("algorithm", ["ddpo_is", "diffusion_nft"])
def test_a_learner_compiles_both_gradient_modes_while_it_starts(
    algorithm: str, tables: dict, calls: list[tuple[int, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"policy__compile": "both", "learner__micro_batch_size": 4, "prompts__images_per_prompt": 2}
    components = components_with({**tables, "algorithm": {"name": algorithm}}, **keys)
    learner = Learner(components.policy, components.algorithm, components.recipe)
    assert set(calls) == ({(8, False), (8, True)} if algorithm == "ddpo_is" else {(8, True)})
    assert all(parameter.grad is None for parameter in learner._policy.network.parameters())
    assert "compiling the learner's network" in capsys.readouterr().out


def test_the_kl_to_the_pretrained_policy_has_the_graph_of_learning(tables: dict, calls: list[tuple[int, bool]]) -> None:
    found = []
    for compiled in (False, True):
        components = components_with(tables, **OWN, policy__compile="both" if compiled else "none")
        learner = learner_of(components)
        sampled = sample_round(components_with(tables, **OWN), learner.weights()[-1])
        transitions = round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu")
        steps = optimizer_steps(torch.arange(8).numpy(), 8, (), transitions.positions(0))
        calls.clear()
        batches = kl_subset(transitions, steps, 4, ProcessGroup())
        found.append(torch.cat(reference_kl(learner._policy, batches, ProcessGroup(), compiled)))
        assert all(is_on for _, is_on in calls)
        indices = indices_of(torch.arange(8), transitions.positions(0))
        found.append(log_probs_under(learner._policy, transitions, micro_batches(indices, 4), compiled))
    assert torch.equal(found[0], found[2]) and found[0].max() > 0 and not found[2].requires_grad
    assert torch.equal(found[1], found[3])


def test_blocks_of_a_network_that_is_not_compiled_are_refused() -> None:
    with pytest.raises(ValidationError) as error:
        StableDiffusion(model="tiny_animals", compile_blocks=True)
    assert_refused("`policy.compile_blocks` where nothing is compiled", str(error.value))

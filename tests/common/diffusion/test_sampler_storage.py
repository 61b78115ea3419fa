"""A sampler's frozen weights in 8 bits: half the bytes, the same adapters, the same bits in every process."""

from pathlib import Path

import pytest
import torch

from ray_ddpo.common.diffusion.lora.adapters import read_weights, trained_parameters
from ray_ddpo.common.diffusion.rollout import sample_trajectories, score
from ray_ddpo.learner.weight_check import computes_as_samplers
from tests.rounds import components_with, learner_of, sample_round
from tests.tiny_policy import SAMPLING, tiny_policy

FLOAT8 = torch.float8_e4m3fn
KEY = {"sampler_storage": "float8_e4m3fn"}
SMALL = {"learner__micro_batch_size": 4}
PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]


def stored_bytes(network: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters() if not parameter.requires_grad)


def test_layers_are_stored_in_eight_bits_but_for_norms_and_adapters(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, **KEY)
    by_name = {name: parameter.dtype for name, parameter in policy.network.named_parameters()}
    assert {dtype for name, dtype in by_name.items() if "lora_" in name or "norm" in name} == {torch.float32}
    stored = [name for name, dtype in by_name.items() if dtype == FLOAT8]
    assert any("to_q.base_layer" in name for name in stored) and any("conv1" in name for name in stored)
    plain = tiny_policy(tiny_model)
    assert stored_bytes(policy.network) < 0.4 * stored_bytes(plain.network)  # from float32, with norms as they were


@pytest.mark.rotated(every=2, group="longest")
def test_the_plan_counts_eight_bits(tiny_model: Path) -> None:
    configs = [tiny_policy(tiny_model, **keys).config for keys in ({}, KEY)]
    plain, stored = (config.sizes(SAMPLING) for config in configs)
    networks = [tiny_policy(tiny_model, **keys).network for keys in ({}, KEY)]
    held = [sum(parameter.nbytes for parameter in network.parameters()) for network in networks]
    assert [plain.network_bytes, stored.network_bytes] == held
    assert stored.network_bytes < 0.5 * plain.network_bytes and stored.learner == plain.learner
    layer = max(parameter.numel() for parameter in networks[1].parameters())
    assert held[0] - held[1] - 8 * layer < plain.sampling.of(1) - stored.sampling.of(1) <= held[0] - held[1]


def test_the_learner_keeps_its_weights(tiny_model: Path) -> None:
    learner = tiny_policy(tiny_model, "learner", **KEY)
    assert {parameter.dtype for parameter in learner.network.parameters()} == {torch.float32}


def test_a_layer_computes_with_its_weights_rounded_to_eight_bits(tiny_model: Path) -> None:
    policy, plain = tiny_policy(tiny_model, **KEY), tiny_policy(tiny_model)
    rounded = [name for name, parameter in policy.network.named_parameters() if parameter.dtype == FLOAT8]
    with torch.no_grad():
        for name, parameter in plain.network.named_parameters():
            if name in rounded:
                parameter.copy_(parameter.to(FLOAT8).float())
    ours, theirs = (sample_trajectories(each, PROMPTS, SEEDS, SAMPLING).final_latents for each in (policy, plain))
    assert torch.equal(ours, theirs)


def test_equal_bits_again_and_in_the_check_of_the_learner(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, **KEY)
    first = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING)
    again = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING)
    assert torch.equal(first.final_latents, again.final_latents), "rounding back changes nothing"
    assert torch.equal(score(tiny_policy(tiny_model, "check", **KEY), first), first.log_probs)
    assert not torch.equal(score(tiny_policy(tiny_model, "learner", **KEY), first), first.log_probs)


def test_adapters_arrive_unrounded(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, **KEY)
    weights = read_weights(tiny_policy(tiny_model, "learner").network, 0)
    policy.load_weights(weights)
    assert read_weights(policy.network, 0).fingerprint == weights.fingerprint
    assert all(parameter.dtype == torch.float32 for parameter in trained_parameters(policy.network).values())


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("algorithm", [{"name": "rwr"}, {"name": "ddpo_is", "off_policy": {"ratio": "proximal"}}])
def test_a_round_is_learned_from_and_its_weights_are_checked(tables: dict, algorithm: dict) -> None:
    components = components_with({**tables, "algorithm": algorithm}, policy__sampler_storage="float8_e4m3fn", **SMALL)
    assert not computes_as_samplers(components.policy, components.recipe)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, after = learner.update(sampled.batch, *sampled.trajectories)
    assert metrics["log_prob_check/max_abs"] == 0.0 and metrics["log_prob_check/rounding"] > 0
    assert after.trained.fingerprint != sampled.batch.reports[0].fingerprint

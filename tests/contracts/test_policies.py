"""The contract of every model family in the registry, and of one from outside. A new family needs a tiny model here."""

import pickle
from pathlib import Path

import pytest
import torch

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.guidance import is_shared
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig, select_rows
from ray_ddpo.common.diffusion.rollout import sample_trajectories, score
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.tiny_families import FROM_OUTSIDE, MAKERS, PROMPTS, policy_table
from tests.tiny_policy import scatter

pytestmark = pytest.mark.rotated(every=3)

ALL_MAKERS = MAKERS | FROM_OUTSIDE
LEADS_NOWHERE = {"sd3": ("transformer_blocks.1.attn.add_q_proj",)}  # the last block's text is not read any more
SAMPLING = SamplingTable(num_steps=4, guidance_scale=3.0)


def test_every_model_family_has_a_tiny_model_to_be_tested_with() -> None:
    assert MAKERS.keys() == POLICIES.keys()


@pytest.fixture(scope="module", params=ALL_MAKERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def prompts(family: str) -> list[str]:
    return PROMPTS.get(family, ["a cat", "a dog", "a cow"])


@pytest.fixture(scope="module")
def config(family: str, tmp_path_factory: pytest.TempPathFactory) -> PolicyConfig:
    model = ALL_MAKERS[family](tmp_path_factory.mktemp("model"))
    return build(POLICIES, policy_table(family, model), "policy", PolicyConfig)


def loaded(config: PolicyConfig, role: str) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = config.load("cpu", SAMPLING, role)
    scatter(policy.network)
    return policy


@pytest.fixture(scope="module")
def policy(config: PolicyConfig) -> Policy:
    return loaded(config, "sampler")


def some_latents(policy: Policy, count: int) -> torch.Tensor:
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(1))


def test_conditioning_has_one_row_a_prompt_and_one_for_all_of_what_is_negative(
    policy: Policy, prompts: list[str]
) -> None:
    conditioning = policy.encode(prompts)
    for name, value in conditioning.items():
        assert len(value) == (1 if is_shared(name) else 3), name
        assert value.isfinite().all()
    # Without input images, an editing family takes the same black one for each prompt.
    read = [name for name in conditioning if not name.startswith("input_") or "prompt" in name]
    positive = [name for name in read if not name.startswith("negative_")]
    assert positive and not any(torch.equal(conditioning[name][0], conditioning[name][1]) for name in positive)


def test_a_prompts_conditioning_does_not_depend_on_its_neighbours(policy: Policy, prompts: list[str]) -> None:
    together, alone = policy.encode(prompts), policy.encode(prompts[1:2])
    for name, value in alone.items():
        assert torch.equal(value, together[name] if is_shared(name) else together[name][1:2]), name


def test_a_transition_is_a_float32_distribution_over_latents_of_the_same_shape(
    policy: Policy, prompts: list[str]
) -> None:
    latents, rows = some_latents(policy, 3), select_rows(policy.encode(prompts), torch.arange(3))
    with torch.no_grad():
        transition = policy.transition(latents, torch.tensor([0, 2, 3]), rows)
    assert transition.mean.shape == latents.shape and transition.std.shape == (3,)
    assert transition.mean.dtype == transition.std.dtype == torch.float32
    assert transition.mean.isfinite().all()


def test_std_is_above_zero_exactly_on_stochastic_steps(policy: Policy, prompts: list[str]) -> None:
    steps = torch.arange(policy.num_steps)
    rows = select_rows(policy.encode(prompts[:1]), torch.zeros(policy.num_steps, dtype=torch.long))
    with torch.no_grad():
        std = policy.transition(some_latents(policy, policy.num_steps), steps, rows).std
    assert policy.stochastic_steps and torch.nonzero(std > 0).flatten().tolist() == policy.stochastic_steps


def test_the_prompt_and_the_trained_weights_move_the_distribution(
    policy: Policy, config: PolicyConfig, prompts: list[str]
) -> None:
    latents, steps = some_latents(policy, 1), torch.tensor([0])
    first, second, _ = prompts

    def mean(of: Policy, prompt: str) -> torch.Tensor:
        with torch.no_grad():
            return of.transition(latents, steps, select_rows(policy.encode([prompt]), torch.tensor([0]))).mean

    other = loaded(config, "learner")
    assert torch.equal(mean(other, first), mean(policy, first))
    assert not torch.equal(mean(policy, first), mean(policy, second))
    scatter(other.network, seed=9)
    assert not torch.equal(mean(other, first), mean(policy, first))


def test_the_learner_computes_the_samplers_exact_log_prob(
    policy: Policy, config: PolicyConfig, prompts: list[str]
) -> None:
    trajectory = sample_trajectories(policy, prompts, [1, 2, 3], SAMPLING)
    arrived = pickle.loads(pickle.dumps(trajectory))
    assert torch.equal(score(loaded(config, "learner"), arrived), trajectory.log_probs)


def test_gradients_reach_every_trained_parameter_and_no_other(
    family: str, config: PolicyConfig, policy: Policy, prompts: list[str]
) -> None:
    learner = loaded(config, "learner")
    latents, rows = some_latents(policy, 2), select_rows(policy.encode(prompts[:2]), torch.arange(2))
    transition = learner.transition(latents, torch.tensor([0, 1]), rows)
    transition.log_prob(transition.sample(torch.ones_like(latents)).detach()).sum().backward()
    trained = trained_parameters(learner.network)
    for name, parameter in learner.network.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    left_out = LEADS_NOWHERE.get(family, ())
    for name, parameter in trained.items():
        assert bool(parameter.grad.abs().max() > 0) != (bool(left_out) and name.startswith(left_out)), name


def test_the_prediction_of_a_noised_image_depends_on_it_alone_in_float32(policy: Policy, prompts: list[str]) -> None:
    clean, noise = some_latents(policy, 3), some_latents(policy, 3).flip(0)
    timesteps, rows = torch.tensor([900, 500, 10]), select_rows(policy.encode(prompts), torch.arange(3))
    with torch.no_grad():
        predicted, target = policy.denoise(clean, noise, timesteps, rows)
        alone, _ = policy.denoise(
            clean[1:2], noise[1:2], timesteps[1:2], select_rows(policy.encode(prompts[1:2]), torch.tensor([0]))
        )
    assert predicted.shape == target.shape == clean.shape and predicted.dtype == target.dtype == torch.float32
    torch.testing.assert_close(predicted[1:2], alone, rtol=1e-4, atol=1e-5)
    assert policy.num_train_timesteps > int(timesteps.max())


def test_a_deterministic_step_has_std_zero_and_another_mean(policy: Policy, prompts: list[str]) -> None:
    latents, rows = some_latents(policy, 2), select_rows(policy.encode(prompts[:2]), torch.arange(2))
    steps = torch.tensor(policy.stochastic_steps[:2])
    with torch.no_grad():
        sampled, still = (policy.transition(latents, steps, rows, stochastic) for stochastic in (True, False))
    assert (sampled.std > 0).all() and not still.std.any()
    assert not torch.allclose(sampled.mean, still.mean, atol=1e-4)


def test_images_are_uint8_with_three_channels_last(policy: Policy) -> None:
    images = policy.decode(some_latents(policy, 2))
    assert images.dtype == torch.uint8 and images.shape[0] == 2 and images.shape[-1] == 3
    assert images.float().std() > 1 and not torch.equal(images[0], images[1])


def test_trained_weights_come_back_from_their_files(config: PolicyConfig, tmp_path: Path) -> None:
    first, second = loaded(config, "learner"), loaded(config, "learner")
    scatter(second.network, seed=4)
    second.restore(first.save(tmp_path))
    wanted = trained_parameters(first.network)
    for name, value in trained_parameters(second.network).items():
        assert torch.equal(value, wanted[name]), name


def test_a_model_that_is_not_there_is_refused_without_loading_anything(config: PolicyConfig) -> None:
    with pytest.raises(ValueError, match="policy.model is '/no/such/model'"):
        config.model_copy(update={"model": "/no/such/model"}).check()


@pytest.mark.rotated(every=8)
def test_sizes_are_those_of_the_policy_that_is_loaded(config: PolicyConfig, policy: Policy) -> None:
    sizes = config.sizes(SAMPLING)
    trained = sum(parameter.numel() for parameter in trained_parameters(policy.network).values())
    assert sizes.trained_parameters == trained and sizes.latent_shape == policy.latent_shape

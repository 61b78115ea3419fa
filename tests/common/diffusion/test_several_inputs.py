"""Families that read several input images of a prompt, compared with diffusers' own pipelines; their cached prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.families.flux2 import unsquared
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.diffusion.rollout import image_noise, inputs_of, sample_trajectories, score
from ray_ddpo.common.input_images import InputImages
from ray_ddpo.common.prompts import File, Prompt
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.input_files import save_several
from tests.own_pipelines import own_call, own_pipeline
from tests.tiny_families import MAKERS, call_keys, policy_table, shown_latents
from tests.tiny_policy import scatter

SEVERAL = ("qwen_image_edit_plus", "flux2_edit", "flux2_klein_edit")
SEEDS = [3, 4, 5, 6]
SAMPLING = SamplingTable(num_steps=3, guidance_scale=3.0)
# Three marks of images and a prompt.
LONG = {"qwen_image_edit_plus": {"max_sequence_length": 80}}


@pytest.fixture(scope="module", params=SEVERAL)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, MAKERS[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Four prompts with 1, 2, 3 and 1 images."""
    return File(path=str(save_several(tmp_path_factory.mktemp("inputs"))), image_column="image").sampled()


def load(family: tuple[str, Path], role: Any = "sampler", most: int = 3) -> DiffusersPolicy:
    keys = LONG.get(family[0], {}) | {"max_input_images": most}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(POLICIES, policy_table(family[0], family[1], **keys), "policy").load("cpu", SAMPLING, role)


def read(policy: DiffusersPolicy, prompts: list[Prompt]) -> InputImages:
    inputs = inputs_of(policy, prompts)
    assert inputs is not None
    return inputs


@pytest.mark.rotated(every=2)
def test_latents_equal_the_pipelines_own_call_with_lists_of_images(
    family: tuple[str, Path], prompts: list[Prompt]
) -> None:
    policy, texts = load(family), [prompt.text for prompt in prompts]
    inputs = read(policy, prompts)
    ours = sample_trajectories(policy, texts, SEEDS, SAMPLING, range(0), inputs=inputs).final_latents
    lists = [[Image.fromarray(image) for image in images] for images in inputs.images]
    assert [len(images) for images in lists] == [1, 2, 3, 1]
    keys = call_keys(family[0], SAMPLING.guidance_scale) | {"image": lists, "num_inference_steps": SAMPLING.num_steps}
    if "negative_prompt" in keys:
        keys["negative_prompt"] = keys["negative_prompt"] * 2
    pipeline = own_pipeline(family[0], policy.config, family[1], False)
    noise = next(image_noise(SEEDS, policy.latent_shape))
    theirs = torch.stack(own_call(family[0], pipeline, texts, noise, output_type="latent", **keys))
    is_klein = family[0] == "flux2_klein_edit"  # its pipeline gives latents as the decoder takes them
    ours = unsquared(policy._unscaled(ours)) if is_klein else shown_latents(family[0], ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.rotated(every=2)
def test_the_learner_computes_exact_log_probs_of_prompts_with_different_numbers_of_images(
    family: tuple[str, Path], prompts: list[Prompt]
) -> None:
    sampler, learner = load(family), load(family, "learner")
    scatter(sampler.network)
    scatter(learner.network)
    inputs, texts = read(sampler, prompts), [prompt.text for prompt in prompts]
    trajectory = sample_trajectories(sampler, texts, SEEDS, SAMPLING, inputs=inputs)
    assert torch.equal(score(learner, trajectory), trajectory.log_probs)
    shapes = sampler.config.sizes(SAMPLING, "cpu").conditioning_shape
    assert shapes == {name: tuple(value.shape[1:]) for name, value in trajectory.conditioning.items()}
    # In another batch a row has the same numbers, but for the rounding of its kernels.
    rows = select_rows(trajectory.conditioning, torch.tensor([2, 0]))
    steps, latents = trajectory.steps[[2, 0], 0], trajectory.latents[[2, 0], 0]
    log_probs = learner.transition(latents, steps, rows).log_prob(trajectory.next_latents[[2, 0], 0])
    torch.testing.assert_close(log_probs, trajectory.log_probs[[2, 0], 0], rtol=1e-5, atol=1e-5)
    log_probs.sum().backward()
    assert any(each.grad is not None and each.grad.any() for each in learner.network.parameters())


@pytest.mark.rotated(every=2)
def test_every_image_of_a_list_and_their_order_move_the_distribution(
    family: tuple[str, Path], prompts: list[Prompt]
) -> None:
    policy = load(family)
    given = read(policy, prompts[2:3])
    first, second, third = given.images[0]
    variants = [(first, second, third), (first, third, second), (first, second), (first, second, second)]
    found = []
    for pixels, *others in variants:
        inputs = InputImages(pixels=pixels[None], masks=given.masks, further=(np.stack(others),))
        found.append(sample_trajectories(policy, ["a cat"], [1], SAMPLING, range(0), inputs=inputs).final_latents)
    for number, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-5 for other in found[:number])


def test_a_prompt_with_more_images_than_the_family_reads_is_refused(
    family: tuple[str, Path], prompts: list[Prompt]
) -> None:
    policy = load(family, most=2)
    with pytest.raises(
        ValueError, match=f"{type(policy).__name__} reads 2 input images a prompt, and 'make it red' has 3"
    ):
        inputs_of(policy, prompts)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[DiffusersPolicy], list[str]]:
    """Return a function that lists the texts that a policy's language model reads from now on."""

    def count(policy: DiffusersPolicy) -> list[str]:
        seen: list[str] = []
        encode = policy.pipeline.encode_prompt
        monkeypatch.setattr(
            policy.pipeline, "encode_prompt", lambda text, **keys: seen.append(text) or encode(text, **keys)
        )
        return seen

    return count


@pytest.mark.parametrize("name", ["qwen_image_edit", "qwen_image_edit_plus"])
def test_a_prompt_with_its_images_is_read_once_by_the_language_model(
    name: str, prompts: list[Prompt], tmp_path: Path, counted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = name, MAKERS[name](tmp_path)
    policy = build(POLICIES, policy_table(*family), "policy").load("cpu", SAMPLING, "sampler")
    texts, seen = ["make it red", "a dog"], counted(policy)
    inputs = read(policy, [prompts[0], prompts[3]])
    first = policy.encode(texts, inputs)
    assert sorted(seen) == [" ", " ", "a dog", "make it red"]  # the negative prompt beside each image
    again = policy.encode(texts[::-1], inputs.select([1, 0]))
    assert len(seen) == 4 and all(torch.equal(again[name].flip(0), rows) for name, rows in first.items())
    policy.encode(texts[:1], inputs.select([1]))  # another image
    assert seen[4:] == ["make it red"]
    row = sum(rows[:1].nbytes for name, rows in first.items() if name.startswith("input_prompt"))
    monkeypatch.setattr("ray_ddpo.common.diffusion.diffusers_policy.EMBEDDING_BYTES", 3 * row)
    policy._embeddings.clear()
    for number in range(4):
        policy.encode([f"a {number}"], inputs.select([0]))
    assert sum(value.nbytes for rows in policy._embeddings.values() for value in rows.values()) == 3 * row

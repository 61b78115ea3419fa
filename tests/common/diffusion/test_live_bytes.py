"""Peaks counted operation by operation, compared with peaks worked out by hand and with those of torch's allocator."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.random_stable_diffusion import save_random_pipeline
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.memory.live_bytes import allocated_peak, line_through, peak_bytes
from ray_ddpo.common.diffusion.memory.meta_device import CUDA, LikeDevice
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.tiny_policy import pair_step, tiny_policy

SAMPLING = SamplingTable(num_steps=3, guidance_scale=3.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_pipeline(tmp_path_factory.mktemp("model"), "tiny")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_of_a_small_step_by_hand(device: str) -> None:
    network = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)).to(device)
    inputs = torch.empty(3, 10, device=device)

    def forward() -> None:
        with torch.no_grad():
            network(inputs)

    def step() -> torch.Tensor:
        return network(inputs)

    # [3 20] before ReLU and [3 20] after it; without gradient the first is gone when [3 5] comes.
    assert peak_bytes(forward) == 4 * (60 + 60)
    # With gradient ReLU's output is kept, and its input is not.
    assert peak_bytes(step) == 4 * (60 + 60)
    network = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 50)).to(device)
    assert peak_bytes(step) == 4 * (60 + 150)


def test_views_and_work_in_place_take_nothing() -> None:
    inputs = torch.zeros(100)

    def work() -> None:
        inputs.view(10, 10).t().add_(1.0)
        doubled = inputs * 2
        doubled.mul_(3.0)[10:].sub_(1.0)

    assert peak_bytes(work) == 400


def test_autocast_runs_in_half_precision_and_norms_in_float32() -> None:
    with torch.device("meta"):
        linear, norm, inputs = nn.Linear(10, 20), nn.LayerNorm(20), torch.empty(3, 10)
    linear.requires_grad_(False)
    with LikeDevice("cuda", torch.bfloat16):
        assert linear(inputs).dtype == torch.bfloat16
        assert norm(linear(inputs)).dtype == torch.float32
    with LikeDevice("cpu", torch.bfloat16):
        assert norm(linear(inputs).float()).dtype == torch.float32
        assert norm.bfloat16()(linear(inputs)).dtype == torch.bfloat16


def test_a_convolution_that_changes_its_memory_format_takes_its_tensors_twice() -> None:
    with torch.device("meta"):
        convolution, inputs = nn.Conv2d(4, 8, 3, padding=1), torch.empty(2, 4, 16, 16)
    own = 4 * 2 * 8 * 16 * 16

    def work() -> None:
        with torch.no_grad():
            convolution(inputs)

    assert peak_bytes(work) == own
    assert peak_bytes(work, CUDA) == own + 4 * (2 * 4 * 16 * 16 + 8 * 4 * 3 * 3) + own
    convolution, inputs = (each.to(memory_format=torch.channels_last) for each in (convolution, inputs))
    assert peak_bytes(work, CUDA) == own


def test_two_points_make_the_line() -> None:
    line = line_through(lambda batch: 100 + 7 * batch, 2, 5)
    assert (line.fixed, line.each, line.of(10)) == (100, 7, 170)


def test_without_a_gpu_memory_held_before_is_added() -> None:
    assert allocated_peak(lambda: torch.empty(10), "cpu", 1000) == 1040


KINDS = {
    "LoRA": {},
    "LoRA in bfloat16": {"dtype": "bfloat16"},
    "whole network": {"train": "full"},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.thorough
@pytest.mark.rotated(every=5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_a_learners_step_takes_what_was_predicted(kind: str, pairs: int, model: Path) -> None:
    policy = tiny_policy(model, "learner", SAMPLING, **KINDS[kind])
    sizes = StableDiffusion(model=str(model), **KINDS[kind]).sizes(SAMPLING, "cpu")
    step = pair_step(policy, pairs)
    step()  # gradients are there from the micro-batch before
    parameters = list(policy.network.parameters())
    trained = sum(4 * parameter.numel() for parameter in parameters if parameter.requires_grad)
    held = sum(parameter.nbytes for parameter in parameters) + 3 * trained
    predicted = sizes.learner.of(pairs)
    print(f"{kind}, {pairs} pairs: {predicted / (held + peak_bytes(step)):.3f} of what was counted")
    assert predicted == pytest.approx(held + peak_bytes(step), rel=0.05)
    assert predicted == pytest.approx(held + _of_the_allocator(step), rel=0.1)


@pytest.mark.thorough
@pytest.mark.parametrize("images", [1, 3, 8])
def test_a_samplers_task_takes_what_was_predicted(images: int, model: Path) -> None:
    policy = tiny_policy(model, "sampler", SAMPLING)
    sizes = StableDiffusion(model=str(model)).sizes(SAMPLING, "cpu")
    prompts, seeds = ["a cat"] * images, list(range(images))

    def task() -> None:
        policy.decode(sample_trajectories(policy, prompts, seeds, SAMPLING).final_latents)

    task()  # the prompts' embeddings are kept
    parts = (policy.network, policy.vae, *policy.text_encoders)
    held = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    print(
        f"{images} images: {sizes.sampler_bytes(images) / (held + _of_the_allocator(task)):.3f} of the allocator's peak"
    )
    assert sizes.sampler_bytes(images) == pytest.approx(held + peak_bytes(task), rel=0.05)
    assert sizes.sampler_bytes(images) == pytest.approx(held + _of_the_allocator(task), rel=0.1)


def _of_the_allocator(work: Callable[[], object]) -> int:
    """Return the peak of bytes that torch's allocator gave out beyond those before, as its profiler reports."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = [
        event["args"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event.get("name") == "[memory]"
    ]
    level = peak = 0
    for change in changes:
        level += change["Bytes"]
        peak = max(peak, level)
    return peak


def test_checkpointed_gradients_are_equal_to_the_last_bit_and_cost_less_memory(model: Path) -> None:
    def gradients(policy: Policy) -> list[torch.Tensor]:
        pair_step(policy, 3)()
        return [parameter.grad for parameter in policy.network.parameters() if parameter.grad is not None]

    plain, checkpointed = (tiny_policy(model, "learner", SAMPLING, gradient_checkpointing=on) for on in (False, True))
    assert checkpointed.network.is_gradient_checkpointing and not plain.network.is_gradient_checkpointing
    assert peak_bytes(pair_step(checkpointed, 3)) < 0.7 * peak_bytes(pair_step(plain, 3))
    for policy in (plain, checkpointed):
        policy.network.zero_grad()
    pairs = list(zip(gradients(plain), gradients(checkpointed), strict=True))
    assert len(pairs) > 10 and all(torch.equal(one, other) for one, other in pairs)
    assert any(one.abs().max() > 0 for one, _ in pairs)
    assert not tiny_policy(model, "sampler", SAMPLING, gradient_checkpointing=True).network.is_gradient_checkpointing

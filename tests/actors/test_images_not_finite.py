"""An image whose latents or pixels are no finite numbers is dropped by name; if all of a round are, the run ends so."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from torch import Tensor

from ray_ddpo import cli
from ray_ddpo.actors.evaluation.eval_set import decoded
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.diffusion import rollout
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.learner.learner import Learner
from tests.accepted_page import assert_accepted, assert_refused
from tests.failure_page import assert_documented
from tests.rounds import components_with, moved
from tests.tiny_policy import SAMPLING, tiny_policy


def poisoned_noise(is_poisoned: Callable[[int], bool]) -> Callable[[list[int], tuple[int, ...]], Iterator[Tensor]]:
    """Return the noise of images, NaN for some seeds."""
    whole = rollout.image_noise

    def noise(seeds: list[int], shape: tuple[int, ...]) -> Iterator[Tensor]:
        for sampled in whole(seeds, shape):
            sampled[[row for row, seed in enumerate(seeds) if is_poisoned(seed)]] = torch.nan
            yield sampled

    return noise


def test_one_image_is_dropped_and_the_others_keep_their_bits(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    components = components_with(tables)
    sampler = Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)
    weights = moved(Learner(components.policy, components.algorithm, components.recipe).weights()[-1])
    task = round_tasks(components.recipe, 0, components.prompts.load())[0]
    whole, _, images = sampler.sample(task, weights)
    assert whole.dropped == {}
    monkeypatch.setattr(rollout, "image_noise", poisoned_noise(lambda seed: seed == task.seeds[1]))
    report, _, poisoned = sampler.sample(task, weights)
    assert list(report.dropped) == [1] and not poisoned.pixels[1].any()
    assert (
        "its latents are not finite: most likely the model overflows in policy.dtype = 'float32'" in report.dropped[1]
    )
    assert report.image_fingerprints[1] == ""
    assert np.array_equal(np.delete(poisoned.pixels, 1, 0), np.delete(images.pixels, 1, 0))


def test_an_image_that_the_decoder_makes_infinite_is_dropped(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    components = components_with(tables)
    sampler = Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)
    weights = Learner(components.policy, components.algorithm, components.recipe).weights()[-1]
    vae = sampler._policy.vae
    whole = vae.decode

    def overflowing(latents: Tensor, **keys: object) -> tuple[Tensor, ...]:
        pixels = whole(latents, **keys)[0]
        pixels[2, 0, 0, 0] = torch.inf
        return (pixels,)

    monkeypatch.setattr(vae, "decode", overflowing)
    report, _, images = sampler.sample(round_tasks(components.recipe, 0, components.prompts.load())[0], weights)
    assert report.dropped == {2: "its pixels are not finite: the decoder overflows in float32"}
    assert not images.pixels[2].any() and images.pixels[1].any()


def test_outside_of_a_run_an_image_that_is_not_finite_is_refused(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    trajectory = rollout.sample_trajectories(policy, ["a cat", "a dog"], [1, 2], SAMPLING)
    trajectory.final_latents[1] = torch.nan
    with pytest.raises(ValueError) as error:
        decoded(policy, trajectory, ["a cat", "a dog"])
    assert "the image of 'a dog' is not finite (1 of 2)" in str(error.value)
    assert_refused("an image that is NaN, in `ddpo sample`, `evaluate` and `report`", str(error.value))


def trained(tables: dict, folder: Path, capfd: pytest.CaptureFixture) -> tuple[int, str]:
    file = folder / "recipe.toml"
    file.write_text(tomli_w.dumps(tables))
    exit_code = cli.main(["train", str(file), "--serial"])
    captured = capfd.readouterr()
    return exit_code, captured.out + captured.err


def test_a_run_trains_on_the_others_and_ends_if_there_are_none(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables |= {"reward": {"name": "function", "path": "tests.faulty_rewards:raises_on_black"}}
    recipe = components_with(tables).recipe
    seeds = [
        task.seeds
        for number in range(2)
        for task in round_tasks(recipe, number, components_with(tables).prompts.load())
    ]
    one = seeds[1][2]
    monkeypatch.setattr(rollout, "image_noise", poisoned_noise(lambda seed: seed == one))
    exit_code, printed = trained(tables, tmp_path, capfd)
    assert exit_code == 0, printed
    assert_accepted("an image whose latents or pixels are NaN or infinite")
    assert f"(seed {one}, prompt " in printed and "is dropped: its latents are not finite" in printed
    assert RunFolder(recipe.run_path()).storage.exists("lora/pytorch_lora_weights.safetensors")
    monkeypatch.undo()
    second = {seed for of_task in seeds[2:] for seed in of_task}
    monkeypatch.setattr(rollout, "image_noise", poisoned_noise(lambda seed: seed in second))
    exit_code, printed = trained({**tables, "name": "all"}, tmp_path, capfd)
    assert_documented("all images of a round are not finite", exit_code, printed)

"""Noised samples: image, timestep and noise are a function of the image's seed and the position."""

import numpy as np
import pytest
import torch

from ray_ddpo.common.trajectory import Trajectory
from ray_ddpo.learner.round_data.noised_samples import NoisedSamples
from ray_ddpo.learner.round_data.transitions import indices_of, round_transitions

SEEDS = (101, 102, 103, 104)


def finished(first_image: int, count: int) -> Trajectory:
    """Return images whose numbers are all different, on an unused trajectory."""
    images = first_image + torch.arange(count)
    path = torch.zeros(count, 1, 1, 2, 2)
    embeds = 1000.0 + images[:, None, None].expand(-1, 3, 2)
    return Trajectory(
        {"prompt_embeds": embeds},
        torch.arange(count),
        torch.zeros(count, 1, dtype=torch.long),
        torch.zeros(count, 1),
        path,
        path,
        images.float()[:, None, None, None].expand(-1, 1, 2, 2),
    )


def noised_samples(per_image: int = 2, sharing_images: int = 1) -> NoisedSamples:
    transitions = round_transitions((finished(0, 3), finished(3, 1)), np.array([0.5, 1.0, 0.0, 0.25]), "cpu")
    return NoisedSamples(transitions, SEEDS, per_image, 1000, sharing_images)


def test_each_row_is_the_requested_image_with_its_weight_and_its_prompt() -> None:
    batch = noised_samples().batch(torch.tensor([(3, 0), (1, 1)]))
    assert batch.clean_latents[:, 0, 0, 0].tolist() == [3, 1] and batch.weights.tolist() == [0.25, 1.0]
    assert batch.conditioning["prompt_embeds"][:, 0, 0].tolist() == [1003, 1001]
    assert batch.old_predictions is None


def test_a_noised_sample_does_not_depend_on_its_batch() -> None:
    indices = torch.tensor([(0, 0), (2, 1), (2, 0)])
    together, alone = noised_samples().batch(indices), noised_samples().batch(indices[1:2])
    assert torch.equal(together.noise[1:2], alone.noise) and together.timesteps[1] == alone.timesteps[0]


def test_every_image_position_and_inner_epoch_has_its_noised_sample() -> None:
    source = noised_samples(per_image=3)
    assert [list(source.positions(epoch)) for epoch in range(2)] == [[0, 1, 2], [3, 4, 5]]
    indices = torch.cat([indices_of(torch.arange(4), source.positions(epoch)) for epoch in range(2)])
    noise = source.batch(indices).noise.flatten(1)
    assert len(indices) == 24 and len({tuple(row) for row in noise.tolist()}) == 24


def test_a_group_may_share_the_noise_and_timesteps_of_its_first_image() -> None:
    source = noised_samples(per_image=3, sharing_images=2)
    indices = indices_of(torch.arange(4), source.positions(0))
    shared, own = source.batch(indices), noised_samples(per_image=3).batch(indices)
    first = {(0, position): row for row, (image, position) in enumerate(indices.tolist()) if image == 0}
    for row, (image, position) in enumerate(indices.tolist()):
        rows = first[0, position], row
        assert torch.equal(*shared.noise[list(rows)]) == (image < 2)
        assert (image < 2) <= (len(set(shared.timesteps[list(rows)].tolist())) == 1)
        if image % 2 == 0:
            assert torch.equal(shared.noise[row], own.noise[row])
    assert len({tuple(row) for row in shared.noise.flatten(1).tolist()}) == 6
    assert shared.clean_latents[:, 0, 0, 0].unique().tolist() == [0, 1, 2, 3]


def test_samples_of_an_image_have_equal_parts_of_the_timesteps_in_each_inner_epoch() -> None:
    source = noised_samples(per_image=3)
    for epoch in range(5):
        batch = source.batch(indices_of(torch.arange(4), source.positions(epoch)))
        for part, timesteps in enumerate(batch.timesteps.view(3, 4)):
            assert 1000 * part // 3 <= timesteps.min() and timesteps.max() <= 1000 * (part + 1) // 3


def test_timesteps_go_evenly_over_the_models_own_and_noise_is_standard_normal() -> None:
    source = noised_samples(per_image=2000)
    batch = source.batch(indices_of(torch.arange(4), source.positions(0)))
    timesteps, noise = batch.timesteps.double(), batch.noise.double()
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    # standard errors: 289 / √8000 = 3.2 of the mean; of normal noise 1 / √32000 = 0.006
    assert float(timesteps.mean()) == pytest.approx(499.5, abs=13) and float(timesteps.std()) == pytest.approx(
        289, rel=0.03
    )
    assert float(noise.mean()) == pytest.approx(0, abs=0.025) and float(noise.std()) == pytest.approx(1, abs=0.02)

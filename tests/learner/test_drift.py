"""The divergence of an update is measured on full images of the round, in one batch if their steps fit into it."""

import numpy as np
import pytest
import torch

from ray_ddpo.learner.drift import kl_subset
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.round_data.transitions import indices_of, optimizer_steps, round_transitions
from tests.rounds import components_with, learner_of, sample_round


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("size", "images", "batches"),
    [(8, 2, [8]), (7, 1, [4]), (4, 1, [4]), (3, 1, [3, 1])],
)
def test_the_subset_has_full_images_that_fill_at_most_one_batch(
    size: int, images: int, batches: list[int], tables: dict
) -> None:
    components = components_with(tables, sampling__num_steps=4, sampling__timestep_fraction=1.0)
    sampled = sample_round(components, learner_of(components).weights()[0], 0)
    transitions = round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu")
    order = np.array([3, 1, 2, 0])
    steps = optimizer_steps(order, 2, (), transitions.positions(0))
    looked_at = list(kl_subset(transitions, steps, size, ProcessGroup()))
    assert [len(batch.steps) for batch in looked_at] == batches
    seen = sorted(float(latents.sum()) for batch in looked_at for latents in batch.latents)
    indices = indices_of(torch.from_numpy(order[:images]), transitions.positions(0))
    assert seen == sorted(float(transitions.batch(index[None]).latents.sum()) for index in indices)

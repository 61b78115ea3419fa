"""A round's pairs: each row of a batch is the image and step that was asked for, whichever trajectory it is in."""

import numpy as np
import pytest
import torch

from ray_ddpo.common.trajectory import Trajectory
from ray_ddpo.learner.round_data.transitions import RoundTransitions, round_transitions


def numbered(first_image: int, prompt_index: list[int], steps: list[int]) -> Trajectory:
    """Every number says where it belongs: 100 · image + step, plus 0.5 in what leaves the step."""
    images = first_image + torch.arange(len(prompt_index))
    places = 100.0 * images[:, None] + torch.tensor(steps)
    latents = places[:, :, None, None, None].expand(-1, -1, 1, 2, 2)
    embeds = 1000.0 * (first_image + 1) + torch.arange(max(prompt_index) + 1)
    return Trajectory(
        {
            "prompt_embeds": embeds[:, None, None].expand(-1, 3, 2),
            "negative_prompt_embeds": torch.full((1, 3, 2), -1.0),
        },
        torch.tensor(prompt_index),
        torch.tensor(steps).expand(len(prompt_index), len(steps)),
        -places,
        latents,
        latents + 0.5,
        (100.0 * images + 99)[:, None, None, None].expand(-1, 1, 2, 2),
    )


@pytest.fixture
def transitions() -> RoundTransitions:
    trajectories = (numbered(0, [0, 1, 0], [3, 7]), numbered(3, [1, 0], [3, 7]))
    return round_transitions(trajectories, np.array([0.0, 1.0, 2.0, 3.0, 4.0]), "cpu")


def test_each_row_is_the_pair_that_was_asked_for(transitions: RoundTransitions) -> None:
    batch = transitions.batch([(4, 0), (1, 1), (0, 1), (3, 0)])
    assert batch.steps.tolist() == [3, 7, 7, 3]
    assert batch.latents[:, 0, 0, 0].tolist() == [403, 107, 7, 303]
    assert batch.next_latents[:, 0, 1, 1].tolist() == [403.5, 107.5, 7.5, 303.5]
    assert batch.old_log_probs.tolist() == [-403, -107, -7, -303]
    assert batch.advantages.tolist() == [4, 1, 0, 3]


def test_each_row_has_its_own_images_prompt(transitions: RoundTransitions) -> None:
    conditioning = transitions.batch([(4, 0), (1, 1), (0, 1), (3, 0), (2, 0)]).conditioning
    # the second trajectory's prompts are numbered from 4000 on
    assert conditioning["prompt_embeds"][:, 0, 0].tolist() == [4000, 1001, 1000, 4001, 1000]
    assert conditioning["negative_prompt_embeds"].shape == (5, 3, 2)


def test_the_pairs_of_images_are_all_their_steps(transitions: RoundTransitions) -> None:
    assert transitions.num_trained_steps == 2
    assert transitions.indices_of(np.array([4, 1])) == [(4, 0), (1, 0), (4, 1), (1, 1)]


def test_set_aside_images_are_missing_from_their_optimizer_step_and_move_no_other(
    transitions: RoundTransitions,
) -> None:
    order = np.array([4, 1, 0, 3, 2])
    assert transitions.optimizer_steps(order, 2, ()) == [
        [(4, 0), (1, 0), (4, 1), (1, 1)],
        [(0, 0), (3, 0), (2, 0), (0, 1), (3, 1), (2, 1)],  # what is left over joins the last one
    ]
    assert transitions.optimizer_steps(order, 2, (0, 1, 3)) == [[(4, 0), (4, 1)], [(2, 0), (2, 1)]]
    assert transitions.optimizer_steps(order, 2, (1, 4)) == [[], [(0, 0), (3, 0), (2, 0), (0, 1), (3, 1), (2, 1)]]

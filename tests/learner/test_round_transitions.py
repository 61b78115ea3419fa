"""A round's transitions: each row of a batch is the requested image and step, in any trajectory."""

import dataclasses

import numpy as np
import pytest
import torch

from ray_ddpo.common.trajectory import Trajectory
from ray_ddpo.learner.round_data.transitions import (
    RoundTransitions,
    indices_of,
    micro_batches,
    optimizer_steps,
    round_transitions,
)
from tests.accepted_page import assert_accepted


def numbered(first_image: int, prompt_index: list[int], steps: list[int]) -> Trajectory:
    """Return trajectories whose numbers are 100 · image + step, plus 0.5 in latents that leave the step."""
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


def test_each_row_is_the_requested_transition(transitions: RoundTransitions) -> None:
    batch = transitions.batch(torch.tensor([(4, 0), (1, 1), (0, 1), (3, 0)]))
    assert batch.steps.tolist() == [3, 7, 7, 3]
    assert batch.latents[:, 0, 0, 0].tolist() == [403, 107, 7, 303]
    assert batch.next_latents[:, 0, 1, 1].tolist() == [403.5, 107.5, 7.5, 303.5]
    assert batch.old_log_probs.tolist() == [-403, -107, -7, -303]
    assert batch.advantages.tolist() == [4, 1, 0, 3]


def test_each_row_has_its_own_images_prompt(transitions: RoundTransitions) -> None:
    conditioning = transitions.batch(torch.tensor([(4, 0), (1, 1), (0, 1), (3, 0), (2, 0)])).conditioning
    # the second trajectory's prompts are numbered from 4000 on
    assert conditioning["prompt_embeds"][:, 0, 0].tolist() == [4000, 1001, 1000, 4001, 1000]
    assert conditioning["negative_prompt_embeds"].shape == (5, 3, 2)


def test_the_indices_of_images_are_all_their_steps(transitions: RoundTransitions) -> None:
    assert transitions.positions(0) == transitions.positions(1) == range(2)
    indices = indices_of(torch.tensor([4, 1]), transitions.positions(0))
    assert indices.tolist() == [[4, 0], [1, 0], [4, 1], [1, 1]]


def steps_of(order: list[int], size: int, dropped: tuple[int, ...], positions: range = range(2)) -> list[list]:
    return [step.tolist() for step in optimizer_steps(np.array(order, int), size, dropped, positions)]


def test_dropped_images_are_missing_from_their_optimizer_step_and_move_no_other() -> None:
    order = [4, 1, 0, 3, 2]
    assert steps_of(order, 2, ()) == [
        [[4, 0], [1, 0], [4, 1], [1, 1]],
        [[0, 0], [3, 0], [2, 0], [0, 1], [3, 1], [2, 1]],  # the remainder joins the last step
    ]
    assert steps_of(order, 2, (0, 1, 3)) == [[[4, 0], [4, 1]], [[2, 0], [2, 1]]]
    assert steps_of(order, 2, (1, 4)) == [[], [[0, 0], [3, 0], [2, 0], [0, 1], [3, 1], [2, 1]]]


def test_a_remainder_joins_the_last_optimizer_step() -> None:
    assert_accepted("`rwr_sparse` with a remainder")

    def sizes(images: int) -> list[int]:
        return [len(step) for step in steps_of(list(range(images)), 4, (), range(1))]

    assert [sizes(images) for images in (0, 3, 4, 5, 8, 9, 11)] == [[], [3], [4], [5], [4, 4], [4, 5], [4, 7]]
    assert steps_of([7, 3, 1, 8, 2], 2, (1,), range(1))[-1] == [[8, 0], [2, 0]]


def test_micro_batches_are_cut_in_order_and_a_remainder_makes_a_smaller_last_one() -> None:
    indices = torch.tensor([(0, 0), (1, 0), (0, 1), (1, 1)])
    assert [part.tolist() for part in micro_batches(indices, 2)] == [[[0, 0], [1, 0]], [[0, 1], [1, 1]]]
    assert [part.tolist() for part in micro_batches(indices[:3], 2)] == [[[0, 0], [1, 0]], [[0, 1]]]
    assert len(micro_batches(indices[:0], 2)) == 0


def test_latents_are_read_in_the_trajectories_own_memory() -> None:
    trajectory = numbered(0, [0], [3, 7])
    latents = trajectory.latents.clone()
    transitions = round_transitions((dataclasses.replace(trajectory, latents=latents),), np.zeros(1), "cpu")
    latents += 1
    assert transitions.batch(torch.tensor([[0, 1]])).latents[0, 0, 0, 0] == 8

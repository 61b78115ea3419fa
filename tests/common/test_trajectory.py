"""Trajectories on the wire: adjacent steps are sent once, and every dtype arrives bit for bit."""

import pickle

import pytest
import torch

from ray_ddpo.common.trajectory import Trajectory, adjacent_latents

BATCH, STEPS, LATENT = 3, 5, (4, 6, 7)


def trajectory(dtype: torch.dtype = torch.float32, kept: slice | list[int] = slice(0, STEPS)) -> Trajectory:
    """Return a random trajectory. A slice keeps adjacent steps as views, a list copies the steps that it names."""
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(BATCH, STEPS + 1, *LATENT, generator=generator).to(dtype)
    if isinstance(kept, slice):
        latents, next_latents = adjacent_latents(path[:, kept.start : kept.stop + 1])
    else:
        latents, next_latents = path[:, kept], path[:, [step + 1 for step in kept]]
    places = list(range(STEPS))[kept] if isinstance(kept, slice) else kept
    return Trajectory(
        {"prompt_embeds": torch.randn(2, 8, 16, generator=generator), "negative_prompt_embeds": torch.zeros(1, 8, 16)},
        torch.tensor([0, 1, 0]),
        torch.tensor(places).expand(BATCH, len(places)),
        torch.randn(BATCH, len(places), generator=generator),
        latents,
        next_latents,
        path[:, -1],
    )


def sent(original: Trajectory) -> tuple[Trajectory, list[memoryview]]:
    """Return what arrives, and the buffers that travelled outside of the pickle, as Ray ships them."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(original, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 3000, "a tensor went into the pickle itself"
    raw = [buffer.raw() for buffer in buffers]
    return pickle.loads(data, buffers=[view.toreadonly() for view in raw]), raw


def assert_equal(first: Trajectory, second: Trajectory) -> None:
    for name in ("prompt_index", "steps", "log_probs", "latents", "next_latents", "final_latents"):
        before, after = getattr(first, name), getattr(second, name)
        assert before.dtype == after.dtype and torch.equal(before, after), name
    assert first.conditioning.keys() == second.conditioning.keys()
    for name, value in first.conditioning.items():
        assert torch.equal(value, second.conditioning[name]), name


def latent_buffers(buffers: list[memoryview], element_size: int) -> list[float]:
    """Return the sizes of the buffers with latents, in latents of one image and one step."""
    one = 4 * 6 * 7 * element_size
    return sorted(
        view.nbytes / one / BATCH for view in buffers if view.nbytes % one == 0 and view.nbytes >= BATCH * one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [slice(0, STEPS), slice(1, 4), slice(2, 3), [0, 2, 3], [1, 4]], ids=str)
def test_a_trajectory_arrives_bit_for_bit(dtype: torch.dtype, kept: slice | list[int]) -> None:
    original = trajectory(dtype, kept)
    arrived, _ = sent(original)
    assert_equal(original, arrived)


@pytest.mark.parametrize(("kept", "latents_on_the_wire"), [(slice(0, STEPS), 6), (slice(1, 4), 4), (slice(0, 1), 2)])
def test_adjacent_steps_are_sent_as_one_tensor(kept: slice, latents_on_the_wire: int) -> None:
    _, buffers = sent(trajectory(kept=kept))
    assert latent_buffers(buffers, 4) == [1, latents_on_the_wire]  # the final latents, and W + 1 of the path


def test_adjacent_steps_share_their_storage_after_arrival() -> None:
    arrived, _ = sent(trajectory())
    assert arrived.latents.untyped_storage().data_ptr() == arrived.next_latents.untyped_storage().data_ptr()
    assert arrived.latents[0, 1].data_ptr() == arrived.next_latents[0, 0].data_ptr()


def test_steps_that_are_not_adjacent_are_sent_separately() -> None:
    original = trajectory(kept=[0, 2, 4])
    arrived, buffers = sent(original)
    assert latent_buffers(buffers, 4) == [1, 3, 3]
    assert arrived.latents.untyped_storage().data_ptr() != arrived.next_latents.untyped_storage().data_ptr()


def test_two_separate_pieces_of_one_trajectory_are_not_adjacent() -> None:
    path = torch.randn(BATCH, 6, *LATENT)
    apart = trajectory(kept=[0, 3])
    fields = {name: getattr(apart, name) for name in ("conditioning", "prompt_index", "steps", "log_probs")}
    original = Trajectory(**fields, latents=path[:, 0:2], next_latents=path[:, 3:5], final_latents=path[:, -1])
    arrived, _ = sent(original)
    assert_equal(original, arrived)


def test_bfloat16_travels_in_two_bytes_a_number() -> None:
    _, buffers = sent(trajectory(torch.bfloat16))
    assert latent_buffers(buffers, 2) == [1, 6]


@pytest.mark.parametrize("kept", [slice(0, STEPS), [0, 2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_num_bytes_are_the_bytes_that_travel(kept: slice | list[int], dtype: torch.dtype) -> None:
    original = trajectory(dtype, kept)
    _, buffers = sent(original)
    assert original.num_bytes == sum(view.nbytes for view in buffers)


def test_a_trajectory_that_arrived_travels_on_as_lightly() -> None:
    arrived, buffers = sent(trajectory())
    again, buffers_again = sent(arrived)
    assert [view.nbytes for view in buffers_again] == [view.nbytes for view in buffers]
    assert_equal(arrived, again)

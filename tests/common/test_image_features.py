"""PageImages go into the network as it was trained on them, and come out as features that tell images apart."""

import numpy as np
import pytest
import torch

from ray_ddpo.common.image_models.linear_probe import as_network_input, load_image_features


def test_black_is_minus_one_and_white_is_one():
    images = np.stack([np.zeros((64, 48, 3), np.uint8), np.full((64, 48, 3), 255, np.uint8)])
    inputs = as_network_input(images)
    assert inputs.shape == (2, 3, 224, 224)
    torch.testing.assert_close(inputs[0], torch.full((3, 224, 224), -1.0))
    torch.testing.assert_close(inputs[1], torch.full((3, 224, 224), 1.0))


def test_channels_stay_red_green_blue():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[..., 0] = 255
    torch.testing.assert_close(as_network_input(image).mean((0, 2, 3)), torch.tensor([1.0, -1.0, -1.0]))


@pytest.fixture(scope="module")
def features():
    return load_image_features()


def test_features_of_a_picture_do_not_depend_on_its_batch(features):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    together = features(images)
    assert together.shape == (3, 1280)
    torch.testing.assert_close(together[1:2], features(images[1:2]), rtol=1e-3, atol=1e-4)


def test_a_moved_disc_has_closer_features_than_stripes(features):
    rows, columns = np.mgrid[:64, :64]
    disc = np.where((rows - 32) ** 2 + (columns - 26) ** 2 < 300, 60, 255)
    stripes = np.where(columns // 8 % 2, 60, 255)
    images = np.stack([disc, disc[:, ::-1], stripes])[..., None].repeat(3, 3).astype(np.uint8)
    one, moved, other = features(images)
    assert (one - moved).norm() < 0.7 * (one - other).norm()

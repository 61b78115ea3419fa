"""What every reward promises, asked of each entry of the room."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.rewards import REWARDS
from actors.rewards.jpeg import JpegCompressibility
from actors.rewards.reward import LoadedReward
from common.registry import build
from tests.reward_services import serving
from tests.tiny_clip import save_tiny_clip, save_tiny_head
from tests.tiny_vlm import save_tiny_encoder, save_tiny_vlm

PROMPTS = ["cat", "dog", "horse", "cat"]
METADATA: list[dict[str, Any]] = [{} for _ in PROMPTS]


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with serving(JpegCompressibility()) as url:
        yield url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory, service: str) -> dict[str, dict[str, Any]]:
    """The keys that an entry cannot do without; most need none."""
    folder = tmp_path_factory.mktemp("weights")
    clip, head = save_tiny_clip(folder / "clip"), save_tiny_head(folder / "head.safetensors")
    return {
        "aesthetic": {"clip": str(clip), "head": str(head)},
        "function": {"path": "tests.user_functions:brightness"},
        "http": {"url": service},
        "vlm_alignment": {
            "model": str(save_tiny_vlm(folder / "vlm")),
            "scorer": str(save_tiny_encoder(folder / "encoder")),
            "scorer_layer": 2,
        },
    }


@pytest.fixture(params=REWARDS)
def table(request: pytest.FixtureRequest, keys: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"name": request.param, **keys.get(request.param, {})}


@pytest.fixture
def reward(table: dict[str, Any]) -> LoadedReward:
    return build(REWARDS, table, "reward").load("cpu")


@pytest.fixture
def images() -> np.ndarray:
    """Four pictures that differ in brightness and detail, read-only as they come out of Ray's store."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (4, 64, 64, 3))
    strength, level = np.array([0, 60, 120, 255]), np.array([250, 30, 120, 0])
    pictures = level[:, None, None, None] + noise * strength[:, None, None, None] // 256
    images = pictures.clip(0, 255).astype(np.uint8)
    images.flags.writeable = False
    return images


def test_a_reward_gives_one_finite_float32_per_image(reward: LoadedReward, images: np.ndarray) -> None:
    rewards = reward(images, PROMPTS, METADATA)
    assert rewards.shape == (4,) and rewards.dtype == np.float32 and np.isfinite(rewards).all()
    assert reward(images[:1], PROMPTS[:1], METADATA[:1]).shape == (1,)


def test_a_reward_tells_different_pictures_apart(reward: LoadedReward, images: np.ndarray) -> None:
    same_prompts = ["cat"] * 4
    assert len(set(reward(images, same_prompts, METADATA).tolist())) == 4


def test_the_same_input_has_the_same_reward_also_after_loading_again(
    table: dict[str, Any], reward: LoadedReward, images: np.ndarray
) -> None:
    first = reward(images, PROMPTS, METADATA)
    again = reward(images, PROMPTS, METADATA)
    afresh = build(REWARDS, table, "reward").load("cpu")(images, PROMPTS, METADATA)
    assert first.tolist() == again.tolist() == afresh.tolist()


def test_a_reward_belongs_to_its_picture_and_not_to_its_place_in_the_batch(
    reward: LoadedReward, images: np.ndarray
) -> None:
    order = [2, 0, 3, 1]
    turned = reward(images[order], [PROMPTS[place] for place in order], METADATA)
    np.testing.assert_allclose(turned, reward(images, PROMPTS, METADATA)[order], rtol=1e-4, atol=1e-4)


def test_a_reward_leaves_its_input_as_it_was(reward: LoadedReward, images: np.ndarray) -> None:
    given, prompts, metadata = images.copy(), list(PROMPTS), [dict(entry) for entry in METADATA]
    reward(given, prompts, metadata)
    assert np.array_equal(given, images) and prompts == PROMPTS and metadata == METADATA


def test_an_unknown_key_is_named_with_the_keys_there_are(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"reward\.sharpness is not a key that is known: the keys here are \["):
        build(REWARDS, {**table, "sharpness": 1}, "reward")


@pytest.mark.parametrize("name", REWARDS)
def test_an_entry_is_checked_without_importing_what_is_heavy(name: str, keys: dict[str, dict[str, Any]]) -> None:
    import subprocess
    import sys

    module, cls = REWARDS[name].split(":")
    check = (
        f"import sys; from {module} import {cls}; {cls}(**{keys.get(name, {})!r}); "
        "print([name for name in ('transformers', 'diffusers') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    printed = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"

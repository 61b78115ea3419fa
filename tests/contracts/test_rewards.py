"""The contract of every reward in the registry."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.jpeg import JpegCompressibility
from ray_ddpo.actors.rewards.reward import LoadedReward
from ray_ddpo.common.recipe.registry import build
from tests.reward_services import serving
from tests.tiny_blip import save_tiny_bert_tokenizer, save_tiny_image_reward
from tests.tiny_clip import save_tiny_clip, save_tiny_head, save_tiny_open_clip
from tests.tiny_vlm import save_tiny_encoder, save_tiny_vlm

PROMPTS = ["cat", "dog", "horse", "cat"]
METADATA: list[dict[str, Any]] = [{} for _ in PROMPTS]


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with serving(JpegCompressibility()) as url:
        yield url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory, service: str) -> dict[str, dict[str, Any]]:
    """Return the keys that a reward requires; most require none."""
    folder = tmp_path_factory.mktemp("weights")
    clip, head = save_tiny_clip(folder / "clip"), save_tiny_head(folder / "head.safetensors")
    return {
        "aesthetic": {"clip": str(clip), "head": str(head)},
        "clip_score": {"clip": str(clip)},
        "pickscore": {"clip": str(clip), "tokenizer": str(clip)},
        "image_reward": {
            "checkpoint": str(save_tiny_image_reward(folder / "image_reward.pt")),
            "tokenizer": str(save_tiny_bert_tokenizer(folder / "bert")),
        },
        "hps_v2": {"checkpoint": str(save_tiny_open_clip(folder / "hps.pt")), "tokenizer": str(clip)},
        "dark_share": {"below": 0.9},  # by default all of these images but one would score 0
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
    """Return four images of different brightness and detail, read-only as from Ray's store."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (4, 64, 64, 3))
    strength, level = np.array([0, 60, 120, 255]), np.array([250, 30, 120, 0])
    unclipped = level[:, None, None, None] + noise * strength[:, None, None, None] // 256
    images = unclipped.clip(0, 255).astype(np.uint8)
    images.flags.writeable = False
    return images


def test_a_reward_gives_one_finite_float32_per_image(reward: LoadedReward, images: np.ndarray) -> None:
    rewards = reward(images, PROMPTS, METADATA)
    assert rewards.shape == (4,) and rewards.dtype == np.float32 and np.isfinite(rewards).all()
    assert reward(images[:1], PROMPTS[:1], METADATA[:1]).shape == (1,)


def test_a_reward_tells_different_images_apart(reward: LoadedReward, images: np.ndarray) -> None:
    same_prompts = ["cat"] * 4
    assert len(set(reward(images, same_prompts, METADATA).tolist())) == 4


def test_the_same_input_has_the_same_reward_also_after_loading_again(
    table: dict[str, Any], reward: LoadedReward, images: np.ndarray
) -> None:
    first = reward(images, PROMPTS, METADATA)
    again = reward(images, PROMPTS, METADATA)
    afresh = build(REWARDS, table, "reward").load("cpu")(images, PROMPTS, METADATA)
    assert first.tolist() == again.tolist() == afresh.tolist()


def test_a_reward_belongs_to_its_image_and_not_to_its_position(reward: LoadedReward, images: np.ndarray) -> None:
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


HOSTILE = {
    "black": np.zeros((2, 48, 48, 3), np.uint8),
    "one colour": np.full((2, 48, 48, 3), (200, 30, 90), np.uint8),
    "1x1": np.full((2, 1, 1, 3), 77, np.uint8),
    "very wide": np.random.default_rng(0).integers(0, 256, (2, 3, 900, 3), dtype=np.uint8),
    "4096x4096": np.random.default_rng(0).integers(0, 256, (1, 4096, 4096, 3), dtype=np.uint8),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.thorough if "4096" in kind else ()) for kind in HOSTILE]
)
def test_a_hostile_image_has_a_finite_score(reward: LoadedReward, kind: str) -> None:
    images = HOSTILE[kind]
    rewards = reward(images, ["cat"] * len(images), [{}] * len(images))
    assert rewards.shape == (len(images),) and rewards.dtype == np.float32 and np.isfinite(rewards).all()


@pytest.mark.parametrize("prompt", ["", " \n", "cat " + "very furry " * 1000, "猫 \x00 <|endoftext|> cat"])
def test_a_hostile_prompt_has_a_finite_score_or_a_clear_error(
    reward: LoadedReward, images: np.ndarray, prompt: str
) -> None:
    try:
        rewards = reward(images[:2], [prompt, "cat"], METADATA[:2])
    except ValueError as error:
        assert "prompt" in str(error) and len(str(error)) < 1000
    else:
        assert rewards.shape == (2,) and np.isfinite(rewards).all()
        # The other image's score is unchanged, so the prompts do not affect each other.
        np.testing.assert_allclose(rewards[1], reward(images[1:2], ["cat"], [{}])[0], rtol=1e-4, atol=1e-4)


def test_only_a_declared_reward_scores_an_image_bit_equally_in_every_batch(
    table: dict[str, Any], reward: LoadedReward, images: np.ndarray
) -> None:
    if not build(REWARDS, table, "reward").independent_of_batch:
        pytest.skip(f"{table['name']} does not say that it is independent of the batch")
    together = reward(images, PROMPTS, METADATA).tobytes()
    for batches in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[2, 0], [3, 1]], [[3, 2, 1, 0]], [[0, 1, 2, 3, 0, 0, 1]]):
        found = np.zeros(4, np.float32)
        for places in batches:
            found[places] = reward(images[places], [PROMPTS[place] for place in places], [{} for _ in places])
        assert found.tobytes() == together, batches


def test_components_are_checked_without_heavy_imports(keys: dict[str, dict[str, Any]]) -> None:
    import subprocess
    import sys

    check = ["import sys", "heavy = lambda: [name for name in ('transformers', 'diffusers') if name in sys.modules]"]
    for name, place in REWARDS.items():
        module, cls = place.split(":")
        check += [f"from {module} import {cls}", f"{cls}(**{keys.get(name, {})!r})", f"print({name!r}, heavy())"]
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", "\n".join(check)]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [f"{name} []" for name in REWARDS]

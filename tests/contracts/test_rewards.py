"""The contract of every reward in the registry."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.rendered_truth import shapes_image, word_image
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.actors.rewards.jpeg import JpegCompressibility
from ray_ddpo.actors.rewards.reward import LoadedReward
from ray_ddpo.common.differentiable_reward import weighted_sum
from ray_ddpo.common.prompts import File
from ray_ddpo.common.recipe.registry import build
from tests.chat_services import MODEL, chat_service
from tests.input_files import save_inputs
from tests.reward_services import serving
from tests.tiny_blip import save_tiny_bert_tokenizer, save_tiny_image_reward
from tests.tiny_clip import save_tiny_clip, save_tiny_head, save_tiny_open_clip
from tests.tiny_qwen import save_tiny_hps_v3, save_tiny_qwen
from tests.tiny_vlm import save_tiny_encoder, save_tiny_vlm

pytestmark = pytest.mark.rotated(every=4)

PROMPTS = ["cat", "dog", "horse", "cat"]
METADATA: list[dict[str, Any]] = [{} for _ in PROMPTS]
FOUR_CIRCLES = {"tag": "counting", "include": [{"class": "circle", "count": 4}]}
# Of rewards that need more of a prompt than one of PROMPTS: prompts and metadata with which images can be scored.
SCORABLE = {
    "ocr": (['a sign "cat"', 'a "cot"', '"dog"', 'a sign "cat"'], METADATA),
    "geneval": (["four circles"] * 4, [FOUR_CIRCLES] * 4),
}


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with serving(JpegCompressibility()) as url:
        yield url


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chat_service(tmp_path_factory.mktemp("chat") / "vlm") as url:
        yield url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory, service: str, chat: str) -> dict[str, dict[str, Any]]:
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
        "geneval": {"detector": "shapes"},
        "http": {"url": service},
        "unified_reward": {"url": chat},
        "hps_v3": {
            "model": str(save_tiny_qwen(folder / "qwen")),
            "checkpoint": str(save_tiny_hps_v3(folder / "hps_v3.safetensors", folder / "qwen")),
            "dtype": "float32",
        },
        "vlm_judge": {"url": chat, "model": MODEL, "questions": [{"text": "is this a {prompt} in the image"}]},
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
def prompts(table: dict[str, Any]) -> list[str]:
    return SCORABLE[table["name"]][0] if table["name"] in SCORABLE else PROMPTS


@pytest.fixture
def metadata(table: dict[str, Any], tmp_path: Path) -> list[dict[str, Any]]:
    if table["name"] == "edit_preservation":
        rows = File(path=str(save_inputs(tmp_path, ["cat"] * 4, (64, 64))), image_column="image", mask_column="mask")
        return [prompt.metadata for prompt in rows.sampled()[:1] * 4]
    return SCORABLE[table["name"]][1] if table["name"] in SCORABLE else METADATA


@pytest.fixture
def images(request: pytest.FixtureRequest) -> np.ndarray:
    """Return four images that differ in what the reward sees, read-only as from Ray's store."""
    table = request.getfixturevalue("table") if "table" in request.fixturenames else {"name": ""}
    images = as_it_takes(table["name"], {"ocr": words, "geneval": circles}.get(table["name"], noise)())
    images.flags.writeable = False
    return images


def as_it_takes(name: str, images: np.ndarray) -> np.ndarray:
    """Return the images, or clips that begin with them for a reward of clips."""
    return np.stack([images, images // 2, 255 - images], axis=1) if name == "motion" else images


def noise() -> np.ndarray:
    """Return images of different brightness and detail."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (4, 64, 64, 3))
    strength, level = np.array([0, 60, 120, 255]), np.array([250, 30, 120, 0])
    unclipped = level[:, None, None, None] + noise * strength[:, None, None, None] // 256
    return unclipped.clip(0, 255).astype(np.uint8)


def words() -> np.ndarray:
    """Return signs with fewer and fewer letters of CAT."""
    return np.stack([word_image(word, 64, np.random.default_rng(4)) for word in ("CAT", "CUT", "COW", "DOG")])


def circles() -> np.ndarray:
    """Return images of four circles and fewer."""
    placed = [("circle", "red", x, y, 0.25) for x in (0.3, 0.7) for y in (0.3, 0.7)]
    return np.stack([shapes_image(placed[:count], 64) for count in (4, 3, 2, 1)])


def test_a_reward_gives_one_finite_float32_per_image(
    reward: LoadedReward, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> None:
    rewards = reward(images, prompts, metadata)
    assert rewards.shape == (4,) and rewards.dtype == np.float32 and np.isfinite(rewards).all()
    assert reward(images[:1], prompts[:1], metadata[:1]).shape == (1,)


def test_a_reward_tells_different_images_apart(
    table: dict[str, Any],
    reward: LoadedReward,
    images: np.ndarray,
    prompts: list[str],
    metadata: list[dict[str, Any]],
) -> None:
    if table["name"] == "preference":
        pytest.skip("an image's side of its pair is not in its pixels")
    assert len(set(reward(images, prompts[:1] * 4, metadata[:1] * 4).tolist())) == 4


def test_the_same_input_has_the_same_reward_also_after_loading_again(
    table: dict[str, Any], reward: LoadedReward, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> None:
    first = reward(images, prompts, metadata)
    again = reward(images, prompts, metadata)
    afresh = build(REWARDS, table, "reward").load("cpu")(images, prompts, metadata)
    assert first.tolist() == again.tolist() == afresh.tolist()


def test_a_reward_belongs_to_its_image_and_not_to_its_position(
    reward: LoadedReward, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> None:
    order = [2, 0, 3, 1]
    turned = reward(images[order], [prompts[place] for place in order], metadata)
    np.testing.assert_allclose(turned, reward(images, prompts, metadata)[order], rtol=1e-4, atol=1e-4)


def test_a_reward_leaves_its_input_as_it_was(
    reward: LoadedReward, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> None:
    given, texts, entries = images.copy(), list(prompts), copy.deepcopy(metadata)
    reward(given, texts, entries)
    assert np.array_equal(given, images) and texts == prompts and entries == metadata


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


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.thorough if "4096" in kind else ()) for kind in HOSTILE]
)
def test_a_hostile_image_has_a_finite_score(
    table: dict[str, Any], reward: LoadedReward, kind: str, prompts: list[str], metadata: list[dict[str, Any]]
) -> None:
    images = as_it_takes(table["name"], HOSTILE[kind])
    rewards = reward(images, prompts[:1] * len(images), metadata[:1] * len(images))
    assert rewards.shape == (len(images),) and rewards.dtype == np.float32 and np.isfinite(rewards).all()


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("prompt", ["", " \n", "cat " + "very furry " * 1000, "猫 \x00 <|endoftext|> cat"])
def test_a_hostile_prompt_has_a_finite_score_or_a_clear_error(
    reward: LoadedReward, images: np.ndarray, prompt: str, prompts: list[str], metadata: list[dict[str, Any]]
) -> None:
    try:
        rewards = reward(images[:2], [prompt, prompts[0]], metadata[:2])
    except ValueError as error:
        assert "prompt" in str(error) and len(str(error)) < 1000
    else:
        assert rewards.shape == (2,) and np.isfinite(rewards).all()
        # The other image's score is unchanged, so the prompts do not affect each other.
        np.testing.assert_allclose(rewards[1], reward(images[1:2], prompts[:1], metadata[:1])[0], rtol=1e-4, atol=1e-4)


def test_only_a_declared_reward_scores_an_image_bit_equally_in_every_batch(
    table: dict[str, Any], reward: LoadedReward, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> None:
    if not build(REWARDS, table, "reward").independent_of_batch:
        pytest.skip(f"{table['name']} does not say that it is independent of the batch")
    together = reward(images, prompts, metadata).tobytes()
    for batches in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[2, 0], [3, 1]], [[3, 2, 1, 0]], [[0, 1, 2, 3, 0, 0, 1]]):
        found = np.zeros(4, np.float32)
        for places in batches:
            found[places] = reward(
                images[places], [prompts[place] for place in places], [metadata[place] for place in places]
            )
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


def test_a_reward_with_a_gradient_scores_as_it_does_on_uint8_images(
    table: dict[str, Any], images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> None:
    reward = build(REWARDS, table, "reward")
    if not reward.is_differentiable:
        with pytest.raises(ValueError, match="has no gradient with respect to the images"):
            reward.load_differentiable("cpu")
        return
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255
    # Less than half a grey level off: rounded as a decoder's image is.
    pixels = (pixels + 0.3 / 255 * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(1))).clamp(max=1)
    pixels.requires_grad_()
    scores = reward.load_differentiable("cpu")(pixels, prompts, metadata)
    assert scores.shape == (4,) and scores.requires_grad
    expected = reward.load("cpu")(images, prompts, metadata)
    np.testing.assert_allclose(scores.detach().numpy(), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert gradient.isfinite().all() and gradient.abs().amax((1, 2, 3))[1:].min() > 0


def test_a_function_on_tensors_is_called_as_a_reward_and_with_gradients(images: np.ndarray) -> None:
    reward = FunctionReward(path="tests.user_functions:redness_of_tensors", differentiable=True)
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float().div(255).requires_grad_()
    scores = reward.load_differentiable("cpu")(pixels, PROMPTS, METADATA)
    np.testing.assert_allclose(reward.load("cpu")(images, PROMPTS, METADATA), scores.detach().numpy(), rtol=1e-6)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert float(gradient[0, 0, 0, 0]) == pytest.approx(1 / 64**2) and not gradient[:, 1:].any()


def test_a_function_that_loses_the_gradient_is_named(images: np.ndarray) -> None:
    pixels = torch.rand(2, 3, 8, 8, requires_grad=True)
    for function, words in (
        (lambda pixels, prompts, metadata: pixels.detach().mean((1, 2, 3)), "numbers without a gradient"),
        (lambda pixels, prompts, metadata: pixels.mean(), r"shape \(\): expected a tensor of shape \(2,\)"),
        (lambda pixels, prompts, metadata: [1.0, 2.0], "returned list"),
    ):
        with pytest.raises(ValueError, match=words):
            weighted_sum({"mine": (1.0, function)}, pixels, ("a", "b"), ({}, {}))

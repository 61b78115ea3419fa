"""HPS v2 is the cosine of an open_clip checkpoint's towers over the full image; errors for missing files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.actors.rewards.hps_v2 import CHECKPOINT, HEADS, REPOSITORY, VIT_H_14_PARAMETERS, HpsV2
from ray_ddpo.common.image_models.clip_towers import clip_towers
from ray_ddpo.common.image_models.open_clip_weights import load_open_clip
from ray_ddpo.common.model_files.model_hub import Weights
from tests.tiny_clip import SIDE, save_tiny_open_clip, save_tiny_tokenizer

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> HpsV2:
    folder = tmp_path_factory.mktemp("hps")
    checkpoint, words = save_tiny_open_clip(folder / "hps.pt"), save_tiny_tokenizer(folder / "words")
    return HpsV2(checkpoint=str(checkpoint), tokenizer=str(words))


def test_the_score_is_the_cosine_and_not_a_logit(reward: HpsV2) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    scores = reward.load("cpu")(images, PROMPTS, [{}] * 2)
    model = load_open_clip(str(reward.checkpoint), HEADS, torch.float32)
    towers = clip_towers(model, Weights(reward.tokenizer, ("tokenizer.json",), ""), "cpu")
    pil_images, texts = towers.embed_images(torch.from_numpy(images)), towers.embed_texts(PROMPTS)
    np.testing.assert_allclose(scores, torch.cosine_similarity(pil_images, texts).numpy(), atol=1e-6)
    assert np.ptp(scores) > 0.01


def test_the_edges_of_a_long_image_count(reward: HpsV2) -> None:
    middle = np.random.default_rng(0).integers(0, 256, (1, SIDE, 3 * SIDE, 3), dtype=np.uint8)
    changed = middle.copy()
    changed[:, :, :8] = 255 - changed[:, :, :8]  # left of what the middle square would keep
    score = reward.load("cpu")
    assert abs(score(middle, ["a cat"], [{}]) - score(changed, ["a cat"], [{}]))[0] > 1e-4


def test_the_default_checkpoint_is_version_2_1_of_the_papers_repository() -> None:
    checkpoint, tokenizer = HpsV2().needs()
    assert (checkpoint.source, checkpoint.files) == ("xswu/HPSv2", ("HPS_v2.1_compressed.pt",))
    assert tokenizer.source == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert HpsV2(dtype="float32").memory_bytes == 4 * VIT_H_14_PARAMETERS


def test_a_given_checkpoint_is_looked_for_in_its_folder(tmp_path: Path) -> None:
    checkpoint, _ = HpsV2(checkpoint=str(tmp_path / "HPS_v2_compressed.pt")).needs()
    assert (checkpoint.source, checkpoint.files) == (str(tmp_path), ("HPS_v2_compressed.pt",))
    with pytest.raises(ValueError, match="HPS_v2_compressed.pt is not there"):
        HpsV2(checkpoint=str(tmp_path / "HPS_v2_compressed.pt")).load("cpu")


def test_a_checkpoint_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=f"reward.checkpoint is '{REPOSITORY}', .* has {CHECKPOINT}; .*not answer"):
        HpsV2().load("cpu")

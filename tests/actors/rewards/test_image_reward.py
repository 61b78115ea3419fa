"""ImageReward is its head over BLIP's reading of image and prompt; the true size; what is said where a part lacks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.actors.rewards.image_reward import PARAMETERS, ImageReward
from ray_ddpo.common.image_models.clip_preprocessing import clip_pixels
from tests.reference.blip_reference import linear, slow_blip
from tests.tiny_blip import (
    HEAD,
    SIDE,
    image_reward_shapes,
    save_tiny_bert_tokenizer,
    save_tiny_image_reward,
    tiny_image_reward_state,
)

PROMPTS = ["A cat in the rain.", "dogs", "the dog " * 1250]


@pytest.fixture
def reward(tmp_path: Path) -> ImageReward:
    checkpoint, words = save_tiny_image_reward(tmp_path / "ir.pt"), save_tiny_bert_tokenizer(tmp_path / "words")
    return ImageReward(checkpoint=str(checkpoint), tokenizer=str(words))


def test_the_score_is_that_of_a_slow_copy_of_the_papers_code(reward: ImageReward) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    scores = reward.load("cpu")(images, PROMPTS, [{}] * 3)

    # [CLS] a cat in the rain . [SEP]; [CLS] dog ##s [SEP]; 33 words between [CLS] and [SEP]
    numbers, mask = torch.zeros(3, 35, dtype=torch.int64), torch.zeros(3, 35, dtype=torch.int64)
    for row, tokens in enumerate(([2, 5, 6, 8, 9, 10, 12, 3], [2, 7, 11, 3], [2, *([9, 7] * 17)[:33], 3])):
        numbers[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    state = tiny_image_reward_state()
    _, values = slow_blip(state, clip_pixels(torch.from_numpy(images), SIDE), numbers, mask)
    values = values[:, 0]
    for number in HEAD:
        values = linear(state, f"mlp.layers.{number}", values)
    expected = (values[:, 0] - 0.16717362830052426) / 1.0333394966054072
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert np.ptp(scores) > 0.01


def test_the_towers_of_image_reward_have_445_278_720_parameters() -> None:
    shapes = image_reward_shapes(1024, 768, (24, 12), patch=16, words=30_524)
    towers = sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith("blip."))
    # Patches, class, 197 places, a norm, 24 blocks of 12,596,224 each.
    images = 3 * 16**2 * 1024 + 1024 + 1024 + 197 * 1024 + 2 * 1024 + 24 * 12_596_224
    # Words, places, a norm, 12 layers: two attentions, of which the second reads 1,024 numbers, and an MLP.
    attentions = 4 * (768**2 + 768) + 2 * (768**2 + 768) + 2 * (768 * 1024 + 768)
    prompts = (30_524 + 512 + 2) * 768 + 12 * (attentions + 2 * 768 * 3072 + 3072 + 768 + 3 * 2 * 768)
    assert towers == images + prompts == PARAMETERS == 445_278_720
    assert ImageReward().memory_bytes == 2 * PARAMETERS


def test_a_checkpoint_without_its_head_is_refused(reward: ImageReward, tmp_path: Path) -> None:
    state = tiny_image_reward_state()
    del state["mlp.layers.7.weight"]
    torch.save(state, tmp_path / "headless.pt")
    with pytest.raises(ValueError, match="headless.pt has not the weights of ImageReward .its head, mlp.layers.0"):
        ImageReward(checkpoint=str(tmp_path / "headless.pt"), tokenizer=reward.tokenizer).load("cpu")


def test_a_tokenizer_of_another_model_is_refused(reward: ImageReward, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"])}
    BertTokenizer(vocab=words).save_pretrained(tmp_path / "others")
    with pytest.raises(ValueError, match="whose tokenizer has 6 tokens: ImageReward's text tower takes 15, of which 2"):
        ImageReward(checkpoint=reward.checkpoint, tokenizer=str(tmp_path / "others")).load("cpu")


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reward: ImageReward) -> None:
    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        ValueError, match="reward.checkpoint is 'THUDM/ImageReward', .* has ImageReward.pt; .*not answer"
    ):
        ImageReward().load("cpu")
    with pytest.raises(ValueError, match="reward.tokenizer is 'google-bert/bert-base-uncased', .*tokenizer.json"):
        ImageReward(checkpoint=reward.checkpoint).load("cpu")

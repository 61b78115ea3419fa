"""PickScore is CLIP's logit; the true architecture's size; weights and vocabulary come from two repositories."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.actors.rewards.pickscore import PickScore
from tests.tiny_clip import save_tiny_clip, save_tiny_tokenizer

PROMPTS = ["a cat", "a dog", "a cat"]


def test_the_score_is_the_logit_of_transformers_own_clip(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    clip, words = save_tiny_clip(tmp_path / "clip"), save_tiny_tokenizer(tmp_path / "words")
    (clip / "tokenizer.json").unlink()
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    scores = PickScore(clip=str(clip), tokenizer=str(words)).load("cpu")(images, PROMPTS, [{}] * 3)

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(words)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        found = model(
            **tokenizer(PROMPTS, padding=True, return_tensors="pt"),
            **processor(images=list(images), return_tensors="pt"),
        )
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, found.logits_per_image.diagonal().numpy(), rtol=1e-4, atol=1e-5)


def test_clip_vit_h_14_has_986_109_441_parameters() -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        config = CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 14}, projection_dim=1024)
        model = CLIPModel(config)
        pixels, tokens = torch.zeros(2, 3, 224, 224), torch.zeros(2, 77, dtype=torch.int64)
        found = model(pixel_values=pixels, input_ids=tokens)
    # Patches 3·14²·1280, class, 257 places, two norms, 32 blocks of 19,677,440 each, the projection.
    images = 3 * 14**2 * 1280 + 1280 + 257 * 1280 + 2 * 2 * 1280 + 32 * 19_677_440 + 1280 * 1024
    # 49,408 words and 77 places, 24 blocks of 12,596,224 each, a norm, the projection.
    prompts = (49_408 + 77) * 1024 + 24 * 12_596_224 + 2 * 1024 + 1024**2
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == images + prompts + 1 == 986_109_441  # and the scale
    assert found.image_embeds.shape == found.text_embeds.shape == (2, 1024)
    assert PickScore().memory_bytes == 2 * count


def test_what_lacks_is_named_by_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="reward.clip is 'yuvalkirstain/PickScore_v1', which cannot be loaded"):
        PickScore().load("cpu")
    clip = save_tiny_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="reward.tokenizer is 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K', which cannot"):
        PickScore(clip=str(clip)).load("cpu")

"""CLIPScore's scale, against transformers' own CLIP; the true architecture's size; what is said where weights lack."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.actors.rewards.clip_score import ClipScore
from tests.tiny_clip import save_tiny_clip

PROMPTS = ["a cat", "a dog", "a cat", "an"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_the_score_is_100_times_the_cosine_also_below_zero(clip: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    images = np.random.default_rng(0).integers(0, 256, (4, 50, 37, 3), dtype=np.uint8)
    scores = ClipScore(clip=str(clip)).load("cpu")(images, PROMPTS, [{}] * 4)

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        found = model(
            **tokenizer(PROMPTS, padding=True, return_tensors="pt"),
            **processor(images=list(images), return_tensors="pt"),
        )
    cosines = torch.cosine_similarity(found.image_embeds, found.text_embeds).numpy()
    np.testing.assert_allclose(scores, 100 * cosines, atol=1e-4)
    assert scores.min() < -1 and scores.max() > 1


def test_clip_vit_l_14_has_427_616_513_parameters() -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        config = CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 14}, projection_dim=768)
        model = CLIPModel(config)
    # The image tower; 49,408 words and 77 places, 12 blocks of 7,087,872 each, a norm, the projection; the scale.
    by_hand = 303_966_208 + (49_408 + 77) * 768 + 12 * 7_087_872 + 2 * 768 + 768**2 + 1
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == 427_616_513
    assert ClipScore().memory_bytes == 2 * by_hand and ClipScore(dtype="float32").memory_bytes == 4 * by_hand


def test_clip_that_is_not_there_is_named_with_its_files_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    said = (
        r"reward.clip is 'openai/clip-vit-large-patch14', which cannot be loaded: it must be a folder .* that has "
        r"config.json, \*.safetensors, tokenizer.json; .* set reward.clip to where they are .*the hub does not answer"
    )
    with pytest.raises(ValueError, match=said):
        ClipScore().load("cpu")

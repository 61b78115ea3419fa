"""The aesthetic reward end to end on a tiny CLIP, the true architecture's size, and what is said where weights lack."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.actors.rewards import aesthetic
from ray_ddpo.actors.rewards.aesthetic import Aesthetic, load_embedder
from ray_ddpo.common.image_models.aesthetic_head import read_head
from ray_ddpo.common.image_models.clip_preprocessing import clip_pixels
from tests.tiny_clip import EMBEDDING, SIDE, save_tiny_clip, save_tiny_head


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return save_tiny_head(tmp_path / "head.safetensors")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)


def test_the_reward_is_the_head_of_clips_projected_embedding_of_norm_one(
    clip: Path, head: Path, images: np.ndarray
) -> None:
    from transformers import CLIPModel

    rewards = Aesthetic(clip=str(clip), head=str(head)).load("cpu")(images, ["cat"] * 3, [{}] * 3)

    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        pooled = model.vision_model(clip_pixels(torch.from_numpy(images), SIDE)).pooler_output
        embeddings = model.visual_projection(pooled)
    ratings = read_head(head)(embeddings / embeddings.norm(dim=-1, keepdim=True))
    np.testing.assert_allclose(rewards, ratings.numpy(), rtol=1e-5)


def test_a_black_and_a_bright_image_have_embeddings_that_differ(clip: Path) -> None:
    # Rescaling twice, as the paper's code did, feeds CLIP two images that are both nearly black.
    embed, dimension = load_embedder(str(clip), "cpu", torch.float32)
    levels = torch.tensor([0, 1, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 32, 32, 3)
    black, nearly_black, bright = embed(levels)
    assert dimension == EMBEDDING
    assert black @ nearly_black > 0.999
    assert black @ bright < 0.9


def test_half_precision_changes_a_rating_by_less_than_a_hundredth(clip: Path, head: Path, images: np.ndarray) -> None:
    full, half = (
        Aesthetic(clip=str(clip), head=str(head), dtype=dtype).load("cpu")(images, ["cat"] * 3, [{}] * 3)
        for dtype in ("float32", "float16")
    )
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(full, half, atol=0.01)


def test_automatic_precision_on_a_cpu_is_float32(clip: Path, head: Path, images: np.ndarray) -> None:
    automatic, full = (
        Aesthetic(clip=str(clip), head=str(head), dtype=dtype).load("cpu")(images, ["cat"] * 3, [{}] * 3)
        for dtype in ("auto", "float32")
    )
    assert np.array_equal(automatic, full)


def test_the_image_tower_of_clip_vit_l_14_has_303_966_208_parameters() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, patch_size=14, image_size=224, projection_dim=768)
        )
    embeddings = tower(pixel_values=torch.zeros(2, 3, 224, 224, device="meta")).image_embeds
    # Patches 3·14²·1024, class, 257 positions, two norms, 24 blocks of 12,596,224 each, projection 1024·768.
    by_hand = 3 * 14**2 * 1024 + 1024 + 257 * 1024 + 2 * 2 * 1024 + 24 * 12_596_224 + 1024 * 768
    assert sum(parameter.numel() for parameter in tower.parameters()) == by_hand == 303_966_208
    assert embeddings.shape == (2, 768)


def test_missing_weights_are_named_with_where_to_put_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: Path
) -> None:
    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    wanted = ("openai/clip-vit-large-patch14", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    for reward, key in (
        (Aesthetic(), "reward.head"),
        (Aesthetic(clip="nobody/no-clip", head=str(head)), "reward.clip"),
    ):
        with pytest.raises(ValueError) as error:
            reward.load("cpu")
        assert str(error.value).startswith(key) and "the hub does not answer" in str(error.value)
        assert all(part in str(error.value) for part in (*wanted, "set reward.clip", "reward.head to the path"))


def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: Path
) -> None:
    def fail() -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", fail)
    with pytest.raises(ValueError, match="reward.clip is .*nowhere"):
        Aesthetic(clip=str(tmp_path / "nowhere"), head=str(head)).load("cpu")


def test_a_clip_without_an_image_tower_is_refused_and_not_filled_with_random_weights(
    tmp_path: Path, head: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing: visual_projection.weight"):
        Aesthetic(clip=str(folder), head=str(head)).load("cpu")


def test_a_head_for_another_clip_is_refused_with_both_dimensions(clip: Path, tmp_path: Path) -> None:
    head = save_tiny_head(tmp_path / "head.safetensors", dimension=24)
    with pytest.raises(ValueError, match=f"embeddings of {EMBEDDING} numbers, and reward.head .* takes 24"):
        Aesthetic(clip=str(clip), head=str(head)).load("cpu")


def test_the_head_that_is_taken_by_default_is_the_one_that_trl_used() -> None:
    assert (aesthetic.HEAD_REPOSITORY, aesthetic.HEAD_FILE) == (
        "trl-lib/ddpo-aesthetic-predictor",
        "aesthetic-model.pth",
    )

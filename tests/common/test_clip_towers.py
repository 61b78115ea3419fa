"""CLIP's towers compared with transformers' own model and processor, and the errors for missing parts."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_ddpo.common.image_models.clip_towers import ClipTowers, load_clip
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.model_files.pretrained import MODEL_FILES, TOKENIZER_FILE
from tests.tiny_clip import save_tiny_clip

PROMPTS = ["a cat", "a dog in the rain", "a cat", "", "dog cat " * 1250]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def load(folder: Path, tokenizer: Path | None = None) -> ClipTowers:
    return load_clip(
        Weights(str(folder), MODEL_FILES, "reward.clip"),
        Weights(str(tokenizer or folder), (TOKENIZER_FILE,), "reward.tokenizer"),
        "cpu",
        torch.float32,
    )


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 40, 48, 3), dtype=np.uint8)


def test_cosines_are_those_of_transformers_own_model_and_processor(folder: Path, images: np.ndarray) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    pil_images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(image_processor=pil_images, tokenizer=CLIPTokenizer.from_pretrained(folder))
    inputs = processor(text=PROMPTS, images=list(images), return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal().numpy()

    towers = load(folder)
    assert inputs["input_ids"].shape == (5, 77)
    assert towers.logit_scale == pytest.approx(model.logit_scale.exp().item())
    np.testing.assert_allclose(towers.logit_scale * towers.cosines(images, PROMPTS), logits, rtol=1e-4, atol=1e-5)
    assert np.ptp(logits) > 1


def test_of_a_prompt_of_10_000_characters_the_first_77_tokens_count(folder: Path) -> None:
    towers = load(folder)
    longer = "cat " * 2500
    # 75 words and the two ends of a text; the 75th word still counts, and the 76th no more.
    at_the_limit, one_short = towers.embed_texts([("cat " * 75)]), towers.embed_texts([("cat " * 74)])
    torch.testing.assert_close(towers.embed_texts([longer]), at_the_limit)
    torch.testing.assert_close(towers.embed_texts(["cat " * 75 + "dog " * 2000]), at_the_limit)
    assert not torch.allclose(towers.embed_texts(["cat " * 74 + "dog " * 2000]), at_the_limit, atol=1e-3)
    assert not torch.allclose(one_short, at_the_limit, atol=1e-3)


def test_a_prompt_that_occurs_several_times_is_encoded_once(folder: Path, images: np.ndarray) -> None:
    towers, asked = load(folder), []

    def embed_texts(prompts: list[str]) -> torch.Tensor:
        asked.append(prompts)
        return towers.embed_texts(prompts)

    counting = ClipTowers(towers.embed_images, embed_texts, towers.logit_scale, "cpu", towers.embed_with_gradient)
    prompts = ["dog", "cat", "dog", "dog", "cat"]
    cosines = counting.cosines(images, prompts)
    assert asked == [["dog", "cat"]]
    alone = [towers.cosines(images[place : place + 1], prompts[place : place + 1])[0] for place in range(5)]
    np.testing.assert_allclose(cosines, alone, atol=1e-6)


def test_embeddings_have_norm_one_and_are_in_float32_also_from_half_precision(folder: Path, images: np.ndarray) -> None:
    weights = Weights(str(folder), MODEL_FILES, "reward.clip")
    half = load_clip(weights, weights, "cpu", torch.float16)
    for embeddings in (half.embed_images(torch.from_numpy(images)), half.embed_texts(["cat", "dog"])):
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(embeddings)))
    full = load(folder).cosines(images, PROMPTS)
    assert not np.array_equal(half.cosines(images, PROMPTS), full)
    np.testing.assert_allclose(half.cosines(images, PROMPTS), full, atol=0.01)


def test_a_clip_in_a_folder_is_read_without_any_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, images: np.ndarray
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for way in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, way, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert np.isfinite(load(folder).cosines(images, PROMPTS)).all()


@pytest.mark.parametrize("weight", ["text_projection.weight", "visual_projection.weight", "logit_scale"])
def test_a_missing_weight_is_an_error_and_never_random(tmp_path: Path, weight: str) -> None:
    folder = save_tiny_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights[weight]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"reward.clip is .*config.json, \*.safetensors.*missing: {weight}, 1 in all"):
        load(folder)


def test_a_weight_of_another_size_is_an_error(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"] = torch.zeros(16, 31)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another size than the configuration says: text_projection.weight"):
        load(folder)


def test_a_clip_without_a_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="reward.tokenizer is .*tokenizer.json.*No such file"):
        load(folder, tokenizer=tmp_path)


def test_a_tokenizer_that_is_not_on_this_machine_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    weights = Weights(str(folder), MODEL_FILES, "reward.clip")
    with pytest.raises(ValueError, match="reward.tokenizer is 'nobody/words', .*the hub does not answer"):
        load_clip(weights, Weights("nobody/words", (TOKENIZER_FILE,), "reward.tokenizer"), "cpu", torch.float32)


@pytest.mark.parametrize("change", ["fewer words", "another end"])
def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(folder: Path, tmp_path: Path, change: str) -> None:
    from transformers import CLIPTokenizer

    from tests.tiny_clip import MERGES, vocabulary

    words = vocabulary()
    if change == "fewer words":
        words = {word: number for word, number in words.items() if number < 512} | {
            "<|startoftext|>": 512,
            "<|endoftext|>": 513,
        }
    else:
        words["<|startoftext|>"], words["<|endoftext|>"] = words["<|endoftext|>"], words["<|startoftext|>"]
    merges = [] if change == "fewer words" else MERGES
    CLIPTokenizer(vocab=words, merges=merges).save_pretrained(tmp_path)
    end, count = words["<|endoftext|>"], len(words)
    with pytest.raises(ValueError, match=f"has {count} tokens and ends a text with number {end}: .* takes 519 and 518"):
        load(folder, tokenizer=tmp_path)

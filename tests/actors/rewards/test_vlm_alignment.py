"""A vision-language model's answers compared with the prompt: a real, tiny LLaVA and BERT, from folders to scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards import vlm_alignment
from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rewards.vlm_alignment import VlmAlignment, asked_and_right, says
from ray_ddpo.common.image_models.bert_score import load_bert_score
from ray_ddpo.common.model_files.model_hub import missing_files
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.trajectory import ImageBatch
from tests.tiny_vlm import WORDS, save_tiny_encoder, save_tiny_vlm

Describe = vlm_alignment.Describe
PROMPTS = ["cat", "two dogs", "a horse on grass"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {"model": str(save_tiny_vlm(folder / "vlm")), "scorer": str(save_tiny_encoder(folder / "encoder"))}


@pytest.fixture(scope="module")
def describe(folders: dict[str, str]) -> Describe:
    return vlm_alignment._load_describer(folders["model"], "cpu", torch.float32, 8)


@pytest.fixture
def images() -> np.ndarray:
    strength = np.array([1, 2, 6], np.uint8)[:, None, None, None]
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8) // strength


def reward(folders: dict[str, str], **fields: Any) -> VlmAlignment:
    return VlmAlignment(**{**folders, "scorer_layer": 2, "max_new_tokens": 8, **fields})


def test_a_score_is_the_recall_of_the_prompt_in_what_the_model_says_of_the_image(
    folders: dict[str, str], describe: Describe, images: np.ndarray
) -> None:
    said = describe(
        [Image.fromarray(image) for image in images], ["Answer concisely: what is going on in this image?"] * 3
    )
    assert len(set(said)) == 3 and all(set(text.split()) <= set(WORDS) for text in said)
    wanted = load_bert_score(folders["scorer"], 2, "cpu", "").recall(
        said, [f"The image contains {prompt}" for prompt in PROMPTS]
    )
    found = reward(folders).load("cpu")(images, PROMPTS, [{}] * 3)
    assert found.dtype == np.float32 and found.tolist() == wanted.tolist()
    assert ((found > 0) & (found <= 1)).all()


def test_the_answers_length_is_limited(folders: dict[str, str], images: np.ndarray) -> None:
    pil_images, questions = [Image.fromarray(image) for image in images], ["what is this"] * 3
    short = vlm_alignment._load_describer(folders["model"], "cpu", torch.float32, 2)(pil_images, questions)
    longer = vlm_alignment._load_describer(folders["model"], "cpu", torch.float32, 6)(pil_images, questions)
    assert max(len(text.split()) for text in short) == 2 and any(len(text.split()) > 2 for text in longer)
    assert all(text.startswith(start) for text, start in zip(longer, short, strict=True))


def test_questions_in_a_batch_get_the_answers_that_they_get_alone(describe: Describe, images: np.ndarray) -> None:
    questions = ["cat", "how many birds are there in this image", "what is this"]
    pil_images = [Image.fromarray(image) for image in images]
    together = describe(pil_images, questions)
    alone = [
        answer
        for pil_image, question in zip(pil_images, questions, strict=True)
        for answer in describe([pil_image], [question])
    ]
    assert together == alone and len(set(together)) == 3


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3)])
def test_a_tiny_image_is_seen_as_its_enlargement(describe: Describe, size: tuple[int, int]) -> None:
    pil_image = Image.fromarray(np.full((*size, 3), (200, 90, 10), np.uint8))
    large = Image.fromarray(np.full((64, 64, 3), (200, 90, 10), np.uint8))
    grey = Image.fromarray(np.full((64, 64, 3), 128, np.uint8))
    assert describe([pil_image], ["what"]) == describe([large], ["what"]) != describe([grey], ["what"])


def test_a_prompt_of_10_000_characters_is_cut_and_scored(folders: dict[str, str], images: np.ndarray) -> None:
    score = reward(folders).load("cpu")
    long = ("red cat " * 1250)[:10_000]
    (found,) = score(images[:1], [long], [{}])
    assert found == score(images[:1], [long[:2_000]], [{}])[0] and np.isfinite(found)


def fixed(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> list[list[str]]:
    """Return a describer that answers by question, and the list of its questions."""
    asked: list[list[str]] = []

    def describe(pil_images: list[Image.Image], questions: list[str]) -> list[str]:
        assert len(pil_images) == len(questions)
        asked.append(questions)
        return [answers[question] for question in questions]

    monkeypatch.setattr(vlm_alignment, "_load_describer", lambda *_: describe)
    return asked


def test_a_model_that_says_nothing_recalls_nothing(
    folders: dict[str, str], images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed(monkeypatch, {"what?": ""})
    assert reward(folders, question="what?").load("cpu")(images, PROMPTS, [{}] * 3).tolist() == [0, 0, 0]
    strict = reward(folders, question="what?", measure="strict").load("cpu")
    assert strict(images, PROMPTS, [{}] * 3).tolist() == [0, 0, 0]


def test_strict_is_the_fraction_of_right_answers_to_each_images_questions(
    folders: dict[str, str], images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"how many?": "There are two of them.", "who?": "They are dogs.", "what?": "A horse, on grass."}
    asked = fixed(monkeypatch, answers)
    metadata = [
        {"questions": ["how many?", "who?"], "answers": ["two", "cat"]},
        {"questions": ["who?", "how many?", "what?"], "answers": ["dog", "two", "a horse on the grass"]},
        {},
    ]
    score = reward(folders, measure="strict", question="what?").load("cpu")
    assert score(images, ["two cats", "?", "a horse on grass"], metadata).tolist() == [0.5, 1.0, 1.0]
    assert asked == [["how many?", "who?", "who?", "how many?", "what?", "what?"]]


def test_strict_runs_with_a_real_model_and_needs_no_text_encoder(folders: dict[str, str], images: np.ndarray) -> None:
    strict = reward(folders, measure="strict", scorer="nobody/nothing")
    said = vlm_alignment._load_describer(folders["model"], "cpu", torch.float32, 8)(
        [Image.fromarray(images[0])], [strict.question]
    )[0]
    first = said.split()[0]
    other = next(word for word in ("cat", "dog", "bird") if word not in said)
    assert strict.load("cpu")(images[[0, 0]], [first, other], [{}, {}]).tolist() == [1, 0]
    assert [weights.source for weights in strict.needs()] == [folders["model"]]


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("There are two dogs.", "two dogs", True),
        ("There are TWO dogs", "two", True),
        ("Two foxes", "fox", True),
        ("dogs, two", "two dog", True),
        ("The cat sits", "a cat", True),
        ("an antelope", "ant", False),
        ("it is often seen", "ten", False),
        ("cattle", "cat", False),
        ("one dog", "two dogs", False),
        ("a dog", "two dogs", False),
        ("two mice", "mouse", False),
        ("", "dog", False),
        ("Katzen und Ähren", "ähren", True),
    ],
)
def test_strict_looks_for_full_words(answer: str, right: str, expected: bool) -> None:
    assert says(answer, right) is expected


@pytest.mark.parametrize(
    ("prompt", "metadata", "words"),
    [
        ("cat", {"questions": ["who?"]}, "answers None"),
        ("cat", {"answers": ["cat"]}, "questions None"),
        ("cat", {"questions": ["who?"], "answers": ["cat", "two"]}, "as many of one as of the other"),
        ("cat", {"questions": [], "answers": []}, "as many"),
        ("cat", {"questions": "who?", "answers": "cat?"}, "a list of texts"),
        ("cat", {"questions": ["who?"], "answers": [2]}, "a list of texts"),
        ("cat", {"questions": ["who?"], "answers": ["…"]}, "needs a word to look for"),
        ("", {}, "needs a word to look for"),
        ("the", {}, "needs a word to look for"),
    ],
)
def test_what_strict_cannot_judge_is_an_error_and_no_score(prompt: str, metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        asked_and_right(prompt, metadata, "what?")


def test_an_error_reaches_the_worker_as_one(folders: dict[str, str], images: np.ndarray) -> None:
    worker = RewardWorker(
        {"vlm": reward(folders, measure="strict")}, RewardPoolTable(batch_size=8), RuntimeTable(device="cpu")
    )
    with pytest.raises(ScoringFailed, match="strict needs a word to look for"):
        worker.score(ImageBatch(images, tuple(Prompt(text) for text in ("cat", "", "dog"))))


def test_what_is_needed_is_named_for_the_doctor_and_found_in_folders(folders: dict[str, str]) -> None:
    model, scorer = VlmAlignment().needs()
    assert (model.source, scorer.source) == ("llava-hf/llava-1.5-7b-hf", "microsoft/deberta-xlarge-mnli")
    assert [missing_files(weights) for weights in reward(folders).needs()] == [[], []]


@pytest.mark.parametrize("key", ["model", "scorer"])
def test_missing_weights_are_named_with_where_to_put_them(
    folders: dict[str, str], key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    for source, why in (("nobody/nothing", "the hub does not answer"), (str(tmp_path / "nowhere"), "nowhere")):
        with pytest.raises(ValueError) as error:
            reward(folders, **{key: source}).load("cpu")
        assert str(error.value).startswith(f"reward.{key} is {source!r}, which cannot be loaded")
        wanted = (
            "llava-hf/llava-1.5-7b-hf",
            "microsoft/deberta-xlarge-mnli",
            "set reward.model and reward.scorer",
            why,
        )
        assert all(part in str(error.value) for part in wanted)


def test_a_model_with_missing_weights_or_without_a_chat_template_is_refused(
    folders: dict[str, str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    silent = save_tiny_vlm(tmp_path / "silent", chat_template=None)
    with pytest.raises(ValueError, match=r"reward.model is .*silent', which has no chat template"):
        reward(folders, model=str(silent)).load("cpu")
    folder = save_tiny_vlm(tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("multi_modal_projector.linear_1.weight")]
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are missing: .*multi_modal_projector.linear_1.weight"):
        reward(folders, model=str(folder)).load("cpu")


def test_a_reference_without_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="must have {prompt}"):
        VlmAlignment(reference="the image")


def test_the_default_models_have_the_parameters_that_the_plan_counts() -> None:
    from transformers import DebertaConfig, DebertaModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    kind: dict[str, Any] = {"pos_att_type": ["c2p", "p2c"], "relative_attention": True, "position_biased_input": False}
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 48}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(vocab_size=32064)))
        scorer = DebertaModel(
            DebertaConfig(**sizes, **kind, vocab_size=50265, num_attention_heads=16, type_vocab_size=0)
        )
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, scorer)]
    assert counts == [7_063_427_072, 757_804_032]
    assert VlmAlignment().memory_bytes == 2 * counts[0] + 4 * counts[1]
    assert VlmAlignment(measure="strict", dtype="float32").memory_bytes == 4 * counts[0]

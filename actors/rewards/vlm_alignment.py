"""Prompt alignment: a vision-language model describes the image (DDPO, section 5.2)."""

import re
from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field, field_validator

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.image_models.bert_score import load_bert_score
from ray_ddpo.common.model_files.model_hub import Weights, read_pretrained
from ray_ddpo.common.model_files.pretrained import Precision, loaded, torch_dtype, weight_bytes

MODEL, SCORER = "llava-hf/llava-1.5-7b-hf", "microsoft/deberta-xlarge-mnli"
SCORER_LAYER = 40  # of 48: the one that agrees best with people, by the table of the paper's code
PARAMETERS, SCORER_PARAMETERS = 7_063_427_072, 757_804_032
WANTED = (
    f"vlm_alignment needs a vision-language model (the files of the hub's {MODEL}, say) and, to compare texts, an "
    f"encoder ({SCORER}); where the hub cannot be reached, copy their folders to this machine, and set reward.model "
    "and reward.scorer to them"
)
ARTICLES = {"a", "an", "the"}

Describe = Callable[[list[Image.Image], list[str]], list[str]]
Metadata = list[dict[str, Any]]


class VlmAlignment(Reward):
    """Vision-language model that describes the image; its answer is compared with the prompt."""

    model: str = MODEL
    """Vision-language model: a folder or a hub name."""
    measure: Literal["bertscore_recall", "strict"] = "bertscore_recall"
    """Recall of `reference` in the answer, up to 1 (`bertscore_recall`), or the share of correct answers (`strict`)."""
    question: str = "Answer concisely: what is going on in this image?"
    """Question to the model. `strict` asks the questions in a prompt's metadata if there are any."""
    reference: str = "The image contains {prompt}"
    """Sentence that the answer is compared with. `{prompt}` stands for the prompt."""
    scorer: str = SCORER
    """BERT model of BERTScore: a folder or a hub name."""
    scorer_layer: int = Field(default=SCORER_LAYER, ge=1)
    """Layer of the BERT model whose output is compared, counted from 1."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    dtype: Precision = "auto"
    """Dtype of the vision-language model. `auto`: float16 on a GPU, float32 on the CPU."""

    @field_validator("reference")
    @classmethod
    def _has_the_prompt(cls, reference: str) -> str:
        if "{prompt}" not in reference:
            raise ValueError("it must have {prompt} where the prompt belongs")
        return reference

    @property
    def score_range(self) -> tuple[float, float] | None:
        return (0.0, 1.0) if self.measure == "strict" else None

    @property
    def memory_bytes(self) -> int:
        model = weight_bytes(PARAMETERS, self.dtype)  # of the default models
        return model + (4 * SCORER_PARAMETERS if self.measure == "bertscore_recall" else 0)

    def needs(self) -> tuple[Weights, ...]:
        model = Weights(self.model, ("config.json", "*.safetensors", "tokenizer*"), "reward.model")
        # Some encoders have no safetensors; their .bin is read with weights_only.
        scorer = Weights(self.scorer, ("config.json", "*model.[bs]*"), "reward.scorer")
        return (model, scorer) if self.measure == "bertscore_recall" else (model,)

    def load(self, device: str) -> LoadedReward:
        describe = _load_describer(self.model, device, torch_dtype(self.dtype, device), self.max_new_tokens)
        if self.measure == "strict":
            return _strict(describe, self.question)
        return self._recalled(describe, device)

    def _recalled(self, describe: Describe, device: str) -> LoadedReward:
        """Load the reward with measure "bertscore_recall"."""
        missing = f"reward.scorer is {self.scorer!r}, which cannot be loaded: {WANTED}"
        bert_score = load_bert_score(self.scorer, self.scorer_layer, device, missing)

        def score(images: Images, prompts: list[str], metadata: Metadata) -> Float[np.ndarray, "B"]:
            answers = describe(_images(images), [self.question] * len(images))
            references = [self.reference.replace("{prompt}", prompt) for prompt in prompts]
            return bert_score.recall(answers, references).cpu().numpy()

        return score


def _strict(describe: Describe, question: str) -> LoadedReward:
    """Return the reward with measure "strict"."""

    def score(images: Images, prompts: list[str], metadata: Metadata) -> Float[np.ndarray, "B"]:
        asked = [asked_and_right(prompt, about, question) for prompt, about in zip(prompts, metadata, strict=True)]
        counts = [len(pairs) for pairs in asked]
        pil_images = [image for image, count in zip(_images(images), counts, strict=True) for _ in range(count)]
        pairs = [pair for each in asked for pair in each]
        answers = describe(pil_images, [about for about, _ in pairs])
        right = [says(answer, words) for answer, (_, words) in zip(answers, pairs, strict=True)]
        ends = np.cumsum(counts)
        return np.array([np.mean(part) for part in np.split(right, ends[:-1])], dtype=np.float32)

    return score


def asked_and_right(prompt: str, metadata: dict[str, Any], question: str) -> list[tuple[str, str]]:
    """Return the questions about an image and their right answers.

    They come from the prompt's metadata, as in the paper's code. Without such metadata, they are `question` and the
    prompt.

    Raises:
        ValueError: questions and answers differ in number, or an answer has no words.
    """
    if "questions" in metadata or "answers" in metadata:
        questions, answers = metadata.get("questions"), metadata.get("answers")
        if not (_texts(questions) and _texts(answers) and len(questions) == len(answers) > 0):
            raise ValueError(
                f"the metadata of prompt {prompt!r} has questions {questions!r} and answers {answers!r}: "
                "strict needs a list of texts each, as many of one as of the other"
            )
    else:
        questions, answers = [question], [prompt]
    for answer in answers:
        if not _words(answer):
            raise ValueError(f"prompt {prompt!r} has the right answer {answer!r}: strict needs a word to look for")
    return list(zip(questions, answers, strict=True))


def says(answer: str, right: str) -> bool:
    """Return whether the answer has every word of `right` but articles, as a full word or its plural in -s or -es."""
    said = set(re.findall(r"\w+", answer.casefold()))
    return all(said & {word, f"{word}s", f"{word}es"} for word in _words(right))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold())) - ARTICLES


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _images(images: Images) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


def _load_describer(name: str, device: str, dtype: torch.dtype, max_new_tokens: int) -> Describe:
    """Load the vision-language model as a function from images and questions to answers."""
    model, processor = _read(name, dtype)
    model = model.to(device)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # an answer continues where its question ends
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.no_grad()
    def describe(images: list[Image.Image], questions: list[str]) -> list[str]:
        """Answer a question about each image, by greedy decoding."""
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image, question in zip(images, questions, strict=True)
        ]
        inputs = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        ).to(device, dtype)
        tokens = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id
        )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]

    return describe


def _read(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load model and processor, and raise ValueError if the processor has no chat template."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    missing = f"reward.model is {name!r}, which cannot be loaded: {WANTED}"

    def read(where: Any, local_files_only: bool) -> tuple[Any, Any]:
        model = loaded(AutoModelForImageTextToText, where, missing, dtype=dtype, local_files_only=local_files_only)
        processor = AutoProcessor.from_pretrained(where, local_files_only=local_files_only, trust_remote_code=False)
        return model, processor

    model, processor = read_pretrained(name, read, missing)
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"reward.model is {name!r}, which has no chat template: it is no model that answers questions")
    return model, processor

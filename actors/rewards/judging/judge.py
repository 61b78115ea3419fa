"""Judge: score images by a vision-language model's answers; the keys that all rewards of this kind have."""

import hashlib
import json
import os
import re
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import ConfigDict, Field, model_validator

from ray_ddpo.actors.rewards.judging.answer_cache import AnswerCache
from ray_ddpo.actors.rewards.judging.answers import ChatAnswer, UnreadableAnswer
from ray_ddpo.actors.rewards.judging.chat import MODELS_PATH, ModelList, TokenUsage, ask_about, chat_body
from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward, RewardMistake
from ray_ddpo.actors.rewards.service_client import RewardServiceFailed, ServiceClient, refuse_secrets
from ray_ddpo.common.input_images import read_inputs
from ray_ddpo.common.prompts import Prompt, refuse_without_inputs
from ray_ddpo.common.reward_protocol import read_token

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")  # not the braces of a JSON object
MILLION = 1_000_000
SHOWN_QUESTION = 80  # characters in an error
Metadata = dict[str, Any]
Shown = tuple[UInt8[np.ndarray, "H W 3"], ...]  # the image that is judged, after its input images if they are shown


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image, and how to read a score from the answer."""

    template: str  # with {prompt} and fields of the metadata
    read: Callable[[ChatAnswer], float]  # raises UnreadableAnswer
    weight: float = 1.0
    max_tokens: int
    log_probs: bool = False


class JudgeReward(Reward):
    """Reward by the answers of a vision-language model behind an OpenAI-compatible service."""

    model_config = ConfigDict(hide_input_in_errors=True)  # an error must not show a password in the URL
    url: str
    """Base URL of the service, as OpenAI's clients take it: `http://host:8000/v1`."""
    model: str = Field(min_length=1)
    """Name under which the service knows the model."""
    token_variable: str | None = None
    """Environment variable that holds the service's key. By default no key is sent."""
    system: str | None = None
    """System message before each question. By default none."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Seconds that one request and its reply may take."""
    attempts: int = Field(default=4, ge=1)
    """Attempts if the service does not answer, or answers 429 or 5xx; also, how often an unreadable answer is asked for."""
    requests_at_once: int = Field(default=8, ge=1, le=1024)
    """Requests in flight at the same time, of each reward worker."""
    cache_answers: int = Field(default=10_000, ge=0)
    """Answers that are remembered by image, question and model. 0: none."""
    cache_folder: str | None = None
    """Folder of a local disk where the answers are kept for other runs, absolute or with `~`. By default in memory."""
    dollars_per_million_input: float | None = Field(default=None, ge=0)
    """Price of a million input tokens. With both prices, the cost in dollars is logged."""
    dollars_per_million_output: float | None = Field(default=None, ge=0)
    """Price of a million output tokens."""
    extra_body: dict[str, Any] = {}
    """Further keys of a request, such as `chat_template_kwargs` of vLLM. They replace `temperature`, which is 0."""
    independent: bool = False
    """Promise that the service gives an image the same answer, whatever else it is asked. Scores can then be cached."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> "JudgeReward":
        """Refuse secrets in the recipe, keys that belong to the program, and a relative folder."""
        refuse_secrets(self.url, self.token_variable)
        if own := sorted(self.extra_body.keys() & {"messages", "model", "stream", "n", "logprobs", "top_logprobs"}):
            raise ValueError(f"extra_body has {own}: these keys of a request are the program's")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra_body cannot be sent as JSON: {error}") from None
        if self.cache_folder and not Path(os.path.expanduser(self.cache_folder)).is_absolute():
            raise ValueError(
                f"cache_folder is {self.cache_folder!r}: it must be absolute or begin with ~, because reward workers "
                "run in folders of their own"
            )
        if (self.dollars_per_million_input is None) != (self.dollars_per_million_output is None):
            raise ValueError("dollars_per_million_input and dollars_per_million_output must be given together")
        return self

    @property
    def shows_input(self) -> bool:
        """True if a prompt's input images are shown before the image that was made of them."""
        return False

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        if self.shows_input:
            refuse_without_inputs(prompts, "the reward's show_input")
        questions = self.asked()
        for prompt in prompts:
            for question in questions:
                fill(question.template, prompt.text, prompt.metadata)

    @abstractmethod
    def asked(self) -> list[Question]:
        """Return the questions about each image. The score is the weighted mean of their answers."""

    @property
    def independent_of_batch(self) -> bool:
        return self.independent

    def check(self) -> None:
        known = [each.id for each in self._client(attempts=1).ask(MODELS_PATH, ModelList).data]
        if self.model not in known:
            raise ValueError(f"model is {self.model!r}: the service at {self.url} has {known}")

    def load(self, device: str) -> LoadedReward:
        """Return the scoring function. The service is not contacted: a worker may start while the service is down.

        Raises:
            ValueError: the service's key is missing, or the cache's folder cannot be used.
        """
        return Judge(self, self._client(self.attempts))

    def _client(self, attempts: int) -> ServiceClient:
        token = read_token(self.token_variable, os.environ)
        return ServiceClient(self.url, token, self.timeout_seconds, attempts)


class Judge:
    """A loaded judge. Calls score images; `take_usage` tells their cost."""

    def __init__(self, settings: JudgeReward, client: ServiceClient) -> None:
        self._settings = settings
        self._client = client
        self._questions = settings.asked()
        self._cache = AnswerCache(settings.cache_folder, settings.cache_answers) if settings.cache_answers else None
        # A batch that fails is scored again by halves; an answer that stays unreadable is not paid for each time.
        self._unreadable: dict[str, str] = {}
        self._usage: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, images: Images, prompts: list[str], metadata: list[Metadata]) -> Float[np.ndarray, "B"]:
        """Score the images.

        Raises:
            RewardMistake: a question needs a field that a prompt's metadata does not have.
            RewardServiceFailed: the service failed, or an image's answer cannot be read.
        """
        filled = [
            [fill(question.template, prompt, about) for question in self._questions]
            for prompt, about in zip(prompts, metadata, strict=True)
        ]
        shown: list[Shown] = [(image,) for image in images]
        if self._settings.shows_input:
            inputs = read_inputs(metadata, images.shape[1:3])
            shown = [(*before, image) for before, image in zip(inputs.images, images, strict=True)]
        with ThreadPoolExecutor(min(self._settings.requests_at_once, len(images))) as pool:
            scores = list(pool.map(self._score, shown, filled))
        return np.array(scores, dtype=np.float32)

    def take_usage(self) -> dict[str, float]:
        """Return requests, tokens and dollars since the last call, and count from 0 again."""
        with self._lock:
            used, self._usage = self._usage, Counter()
        used["requests"] = self._client.take_requests()
        names = ("requests", "cached_answers", "input_tokens", "output_tokens")
        usage = {name: float(used[name]) for name in names}
        prices = self._settings.dollars_per_million_input, self._settings.dollars_per_million_output
        if prices[0] is not None and prices[1] is not None:
            usage["dollars"] = (usage["input_tokens"] * prices[0] + usage["output_tokens"] * prices[1]) / MILLION
        return usage

    def _score(self, shown: Shown, texts: list[str]) -> float:
        """Return the weighted mean of the answers about one image."""
        pairs = list(zip(self._questions, texts, strict=True))
        total = sum(question.weight * self._read(shown, question, text) for question, text in pairs)
        return total / sum(question.weight for question, _ in pairs)

    def _read(self, shown: Shown, question: Question, text: str) -> float:
        """Return the score of one answer, from the cache or from the service."""
        settings = self._settings
        body = chat_body(
            settings.model, settings.system, text, question.max_tokens, question.log_probs, settings.extra_body
        )
        key = _cache_key(shown, settings.url, body)
        if (known := self._unreadable.get(key)) is not None:
            raise RewardServiceFailed(known)
        if self._cache and (remembered := self._cache.get(key)):
            try:
                score = question.read(remembered)
            except UnreadableAnswer:
                pass  # it was read by other rules: ask again
            else:
                with self._lock:
                    self._usage["cached_answers"] += 1
                return score
        return self._ask(shown, question, text, body, key)

    def _ask(self, shown: Shown, question: Question, text: str, body: Metadata, key: str) -> float:
        """Ask until an answer can be read. Raise RewardServiceFailed if none can be."""
        fault = ""
        for _ in range(self._settings.attempts):
            answer, usage = ask_about(self._client, body, *shown)
            self._count(usage)
            try:
                if answer.cut_off and not question.log_probs:
                    raise UnreadableAnswer(f"it was cut off after {question.max_tokens} tokens")
                score = question.read(answer)
            except UnreadableAnswer as error:
                fault = f"answered {self._client.quoted(answer.text)} to {text[:SHOWN_QUESTION]!r}: {error}"
                continue
            if self._cache:
                self._cache.put(key, answer)
            return score
        self._unreadable[key] = f"{self._settings.model} {fault}"
        if len(self._unreadable) > max(1, self._settings.cache_answers):
            self._unreadable.clear()
        raise RewardServiceFailed(f"{self._settings.model} {fault}")

    def _count(self, usage: TokenUsage) -> None:
        with self._lock:
            self._usage["input_tokens"] += usage.prompt_tokens
            self._usage["output_tokens"] += usage.completion_tokens


def fill(template: str, prompt: str, metadata: Metadata) -> str:
    """Put the prompt and fields of its metadata into `{prompt}` and `{field}`. Braces around anything else stay.

    Raises:
        RewardMistake: the metadata lacks a field.
    """
    values = {**metadata, "prompt": prompt}

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise RewardMistake(
                f"a question has {{{match[1]}}}, which the metadata of prompt {prompt[:SHOWN_QUESTION]!r} does not "
                f"have: it has {sorted(metadata)}"
            )
        found = values[match[1]]
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)

    return PLACEHOLDER.sub(value, template)


def _cache_key(shown: Shown, url: str, body: Metadata) -> str:
    """Hash the images with everything else that an answer depends on."""
    pixels = b"".join(np.ascontiguousarray(image).tobytes() for image in shown)
    beside = json.dumps([*(image.shape for image in shown), url, body], sort_keys=True)
    return hashlib.sha256(pixels + beside.encode()).hexdigest()

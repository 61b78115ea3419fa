"""Ask a vision-language model about an image through an OpenAI-compatible service (`/chat/completions`)."""

import json
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ray_ddpo.actors.rewards.judging.answers import ChatAnswer
from ray_ddpo.actors.rewards.service_client import ServiceClient
from ray_ddpo.common.reward_protocol import Message, to_png

CHAT_PATH, MODELS_PATH = "/chat/completions", "/models"
CANDIDATES = 20  # for the first token: the most that OpenAI's and vLLM's services give


class TokenLogProb(Message):
    """A token and its log-prob in nats."""

    token: str
    logprob: float


class TokenChoice(TokenLogProb):
    """A sampled token and the most probable tokens in its place."""

    top_logprobs: list[TokenLogProb] = []


class LogProbs(Message):
    """Log-probs of an answer's tokens."""

    content: list[TokenChoice] | None = None


class AnswerMessage(Message):
    """The model's message."""

    content: str | None = None


class Choice(Message):
    """An answer."""

    message: AnswerMessage
    logprobs: LogProbs | None = None
    finish_reason: str | None = None


class TokenUsage(Message):
    """Tokens that a request cost."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatReply(Message):
    """A service's reply to a question."""

    choices: list[Choice]
    usage: TokenUsage | None = None


class ModelEntry(Message):
    """A model of the service."""

    id: str


class ModelList(Message):
    """The models of the service."""

    data: list[ModelEntry]


def chat_body(
    model: str, system: str | None, question: str, max_tokens: int, log_probs: bool, extra_body: dict[str, Any]
) -> dict[str, Any]:
    """Return a request without its image. Keys of `extra_body` come last, and replace ours."""
    before = [{"role": "system", "content": system}] if system else []
    body = {
        "model": model,
        "messages": [*before, {"role": "user", "content": [{"type": "text", "text": question}]}],
        "temperature": 0.0,
        "max_tokens": max_tokens,
    }
    if log_probs:
        body |= {"logprobs": True, "top_logprobs": CANDIDATES}
    if "max_completion_tokens" in extra_body:  # a service refuses a request with both
        del body["max_tokens"]
    return body | extra_body


def ask_about(
    client: ServiceClient, body: dict[str, Any], *images: UInt8[np.ndarray, "H W 3"]
) -> tuple[ChatAnswer, TokenUsage]:
    """Send a request with its images before the question, and return the answer with its cost in tokens.

    Raises:
        RewardServiceFailed: no answer came.
    """
    *before, question = body["messages"]
    urls = [f"data:image/png;base64,{to_png(image)}" for image in images]
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [*before, {**question, "content": [*shown, *question["content"]]}]
    reply = client.ask(CHAT_PATH, ChatReply, json.dumps({**body, "messages": messages}).encode())
    usage = reply.usage or TokenUsage()
    if not reply.choices:
        return ChatAnswer(""), usage
    choice = reply.choices[0]
    tokens = choice.logprobs.content if choice.logprobs else None
    candidates = tuple((each.token, each.logprob) for each in tokens[0].top_logprobs) if tokens else ()
    return ChatAnswer(choice.message.content or "", candidates, choice.finish_reason == "length"), usage

"""OpenAI-compatible chat services on real sockets: one around a small vision-language model, and scripted answers."""

import base64
import http.server
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.reward_services import Answer, running
from tests.tiny_vlm import WORDS, save_tiny_vlm

MODEL = "tiny-vlm"
YES_NO = ("yes", "no")


class TinyVlm:
    """A small LLaVA with random weights that answers "yes" or "no", as a service that restricts the choice does."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        save_tiny_vlm(folder, words=[*WORDS, "yes"])
        self._model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self._processor = AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def answer(self, image: Image.Image, question: str) -> tuple[list[tuple[str, float]], int]:
        """Return both words with their log-probs, the more probable one first, and the tokens of the question."""
        conversation = [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
        ]
        inputs = self._processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        rows = self._processor.tokenizer.convert_tokens_to_ids(list(YES_NO))
        log_probs = self._model(**inputs).logits[0, -1, rows].double().log_softmax(0).tolist()
        pairs: list[tuple[str, float]] = list(zip(YES_NO, log_probs, strict=True))
        found = sorted(pairs, key=lambda each: -each[1])
        return found, inputs["input_ids"].shape[1]


class ChatHandler(http.server.BaseHTTPRequestHandler):
    vlm: TinyVlm
    token: str | None

    def do_GET(self) -> None:
        self._reply({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.token and self.headers["Authorization"] != f"Bearer {self.token}":
            self._reply({"error": {"message": f"wrong key: {self.headers['Authorization']}"}}, 401)
            return
        shown, text = body["messages"][-1]["content"]
        png = base64.b64decode(shown["image_url"]["url"].removeprefix("data:image/png;base64,"), validate=True)
        found, tokens = self.vlm.answer(Image.open(io.BytesIO(png)), text["text"])
        candidates = [{"token": word, "logprob": log_prob, "bytes": None} for word, log_prob in found]
        log_probs = {"content": [{**candidates[0], "top_logprobs": candidates}]} if body.get("logprobs") else None
        message = {"role": "assistant", "content": self._axes(png, text["text"]) or found[0][0]}
        choice = {"index": 0, "message": message, "logprobs": log_probs, "finish_reason": "stop"}
        usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
        self._reply({"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage})

    def _axes(self, png: bytes, question: str) -> str:
        """Return ratings from 1 to 5 in UnifiedReward's form, made of the probability of "yes"; empty if not asked."""
        if "Alignment Score (1-5): X" not in question:
            return ""
        lines = []
        for axis in ("Alignment", "Coherence", "Style"):
            found, _ = self.vlm.answer(Image.open(io.BytesIO(png)), f"is {axis} good {question[-40:]}")
            lines.append(f"{axis} Score (1-5): {1 + 4 * math.exp(dict(found)['yes'])}")
        return "\n".join(lines)

    def _reply(self, value: dict[str, Any], status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: object) -> None:
        """Keep requests out of the tests' output."""


@contextmanager
def chat_service(folder: Path, token: str | None = None) -> Iterator[str]:
    """Serve the small model. Return the base URL."""
    handler = type("Handler", (ChatHandler,), {"vlm": TinyVlm(folder), "token": token})
    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        yield f"{url}/v1"


def says(text: str | None, tokens: tuple[int, int] = (100, 10), finish: str = "stop", **log_probs: float) -> Answer:
    """Return a scripted reply with this text, its tokens in and out, and candidates for its first token."""
    candidates = [{"token": token, "logprob": value} for token, value in log_probs.items()]
    first = {"token": "x", "logprob": 0.0, "top_logprobs": candidates}
    choice = {
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
        "logprobs": {"content": [first]} if log_probs else None,
    }
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return 200, json.dumps({"choices": [choice], "usage": usage}).encode(), {}

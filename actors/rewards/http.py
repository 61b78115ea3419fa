"""A reward from a service: images go there over HTTP, and scores come back as JSON. Nothing is unpickled.

The retry loop is our own: with tenacity, Retry-After and the statuses would need as much code.
"""

import email.utils
import json
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import httpx2
import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, Field, ValidationError, model_validator

from ray_ddpo.actors.rewards.backoff import backoff_seconds
from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward, RewardMistake
from ray_ddpo.common.reward_protocol import HEALTH_PATH, SCORE_PATH, Health, Message, ScoreReply, read_token, to_png

CONNECT_SECONDS = 10.0
MAX_REPLY_BYTES = 16_000_000
QUOTED = 200  # characters of a reply shown in an error

MessageT = TypeVar("MessageT", bound=Message)


class RewardServiceFailed(ValueError):
    """Error of a service that did not answer, refused, or sent an invalid reply. A retry may succeed."""


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    retry_after: str | None


class RewardClient:
    """HTTP client of one service. It retries if the service does not answer, or answers 429 or 5xx."""

    def __init__(self, url: str, token: str | None, timeout_seconds: float, attempts: int) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._seconds = timeout_seconds
        self._attempts = attempts
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connect = min(CONNECT_SECONDS, timeout_seconds)
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(timeout_seconds, connect=connect))

    def ask(self, path: str, kind: type[MessageT], body: bytes | None = None) -> MessageT:
        """Return the reply to a GET, or to a POST of `body`.

        Raises:
            RewardServiceFailed: no reply came, or the reply is not a message of this kind.
        """
        reply = self._with_retries(path, body)
        try:
            return kind.model_validate_json(reply)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(str(part) for part in fault["loc"]) or "all of it"
            keys = ", ".join(f'"{name}"' for name in kind.model_fields)
            raise RewardServiceFailed(
                f"{self.url} answered {self._quoted(reply)}: it must be a JSON object with {keys} ({place}: "
                f"{fault['msg']})"
            ) from None

    def _with_retries(self, path: str, body: bytes | None) -> bytes:
        """Return the body of the first successful reply."""
        for attempt in range(1, self._attempts + 1):
            pause = backoff_seconds(attempt)
            try:
                answer = self._once(path, body)
            except httpx2.RequestError as error:
                fault = f"{self.url} does not answer: {type(error).__name__}: {self._hidden(str(error))}"
            else:
                if answer.status == httpx2.codes.OK:
                    return answer.body
                fault = f"{self.url} answered {answer.status}: {self._quoted(answer.body)}"
                if answer.status != httpx2.codes.TOO_MANY_REQUESTS and answer.status < 500:
                    break
                pause = max(pause, min(self._seconds, _asked_pause(answer.retry_after)))
            if attempt < self._attempts:
                time.sleep(pause)
        raise RewardServiceFailed(fault)

    def _once(self, path: str, body: bytes | None) -> _Answer:
        """Send one request. The total time is limited here, because the timeout of httpx is for each read."""
        deadline, parts, size = time.monotonic() + self._seconds, [], 0
        with self._client.stream("GET" if body is None else "POST", self.url + path, content=body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"no complete reply within {self._seconds:g} s")
                if size > MAX_REPLY_BYTES:
                    raise httpx2.ReadError(f"its reply is over {MAX_REPLY_BYTES} bytes")
        return _Answer(response.status_code, b"".join(parts), response.headers.get("Retry-After"))

    def _quoted(self, body: bytes) -> str:
        return repr(self._hidden(body.decode("utf-8", "replace"))[:QUOTED])

    def _hidden(self, text: str) -> str:
        """Remove the token, because some services repeat a token that they refuse."""
        return text.replace(self._token, "…") if self._token else text


def _asked_pause(retry_after: str | None) -> float:
    """Return the seconds that a Retry-After header asks for: a number or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return 0.0
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


class Http(Reward):
    """Reward service that scores images over HTTP."""

    model_config = ConfigDict(hide_input_in_errors=True)  # an error must not show a password in the URL
    url: str
    """URL of the service."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Seconds that one request and its reply may take."""
    attempts: int = Field(default=3, ge=1)
    """Attempts if the service does not answer, or answers 429 or 5xx."""
    token_variable: str | None = None
    """Environment variable that holds the token of the service. By default no token is sent."""
    images_per_request: int | None = Field(default=None, ge=1)
    """Images per request. By default the whole scoring batch."""
    independent: bool = False
    """Promise that an image's score has the same bits in any request. Scores can then be cached."""

    # This validator checks the whole model because the error of a field validator shows the field's value.
    @model_validator(mode="after")
    def _holds_no_secret(self) -> "Http":
        """Refuse credentials in the URL, and a token in place of a variable's name."""
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", self.url):
            shown = re.sub(r"//.*@", "//", self.url).partition("?")[0]
            raise ValueError(
                f"url is {shown!r}: it must be http(s)://host:port or http(s)://host/path, "
                "without a user's name, a password or a query"
            )
        if self.token_variable is not None and not re.fullmatch("[A-Z][A-Z0-9_]*", self.token_variable):
            raise ValueError(
                "token_variable is not the name of an environment variable in capitals, such as REWARD_TOKEN; "
                "the token itself never stands in a recipe"
            )
        return self

    @property
    def independent_of_batch(self) -> bool:
        return self.independent

    def check(self) -> None:
        self._client(attempts=1).ask(HEALTH_PATH, Health)

    def _client(self, attempts: int) -> RewardClient:
        return RewardClient(self.url, read_token(self.token_variable, os.environ), self.timeout_seconds, attempts)

    def load(self, device: str) -> LoadedReward:
        """Return the scoring function. The service is not contacted: a worker may start while the service is down.

        Raises:
            ValueError: the token is missing.
        """
        client = self._client(self.attempts)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            size = self.images_per_request or len(images)
            scores = []
            for start in range(0, len(images), size):
                part = slice(start, start + size)
                scores += _ask(client, images[part], prompts[part], metadata[part])
            with np.errstate(over="ignore"):  # a score too large for float32 becomes infinite, so the image is dropped
                return np.array([np.nan if score is None else score for score in scores]).astype(np.float32)

        return score


def _ask(
    client: RewardClient, images: Images, prompts: list[str], metadata: list[dict[str, Any]]
) -> list[float | None]:
    """Send one request, and return a score an image."""
    request = {"images": [to_png(image) for image in images], "prompts": prompts, "metadata": metadata}
    try:
        body = json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardMistake(f"the prompts' metadata cannot be sent as JSON: {error}") from error
    scores = client.ask(SCORE_PATH, ScoreReply, body).scores
    if len(scores) != len(images):
        raise RewardMistake(f"{client.url} gave {len(scores)} scores for {len(images)} images: one each is needed")
    return scores

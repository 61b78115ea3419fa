"""HTTP client of a service that scores: retries, pauses that the service asks for, and a token that is never shown.

The retry loop is our own: with tenacity, Retry-After and the statuses would need as much code.
"""

import email.utils
import re
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import httpx2
from pydantic import ValidationError

from ray_ddpo.actors.rewards.backoff import backoff_seconds
from ray_ddpo.common.reward_protocol import Message

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


class ServiceClient:
    """HTTP client of one service. It retries if the service does not answer, or answers 429 or 5xx.

    Several threads may ask at once. If one of them is answered 429, all of them wait before their next request.
    """

    def __init__(self, url: str, token: str | None, timeout_seconds: float, attempts: int) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._seconds = timeout_seconds
        self._attempts = attempts
        self._earliest = 0.0  # of the next request, after a 429
        self._requests = 0  # since they were taken
        self._lock = threading.Lock()
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
                f"{self.url} answered {self.quoted(reply)}: it must be a JSON object with {keys} ({place}: "
                f"{fault['msg']})"
            ) from None

    def _with_retries(self, path: str, body: bytes | None) -> bytes:
        """Return the body of the first successful reply."""
        for attempt in range(1, self._attempts + 1):
            pause = backoff_seconds(attempt)
            time.sleep(max(0.0, self._earliest - time.monotonic()))
            try:
                answer = self._once(path, body)
            except httpx2.RequestError as error:
                fault = f"{self.url} does not answer: {type(error).__name__}: {self._hidden(str(error))}"
            else:
                if answer.status == httpx2.codes.OK:
                    return answer.body
                fault = f"{self.url} answered {answer.status}: {self.quoted(answer.body)}"
                if answer.status != httpx2.codes.TOO_MANY_REQUESTS and answer.status < 500:
                    break
                pause = max(pause, min(self._seconds, _asked_pause(answer.retry_after)))
                if answer.status == httpx2.codes.TOO_MANY_REQUESTS:
                    with self._lock:
                        self._earliest = max(self._earliest, time.monotonic() + pause)
            if attempt < self._attempts:
                time.sleep(pause)
        raise RewardServiceFailed(fault)

    def take_requests(self) -> int:
        """Return the number of requests since the last call, also of those that failed, and count from 0 again."""
        with self._lock:
            taken, self._requests = self._requests, 0
        return taken

    def _once(self, path: str, body: bytes | None) -> _Answer:
        """Send one request. The total time is limited here, because the timeout of httpx is for each read."""
        deadline, parts, size = time.monotonic() + self._seconds, [], 0
        with self._lock:
            self._requests += 1
        with self._client.stream("GET" if body is None else "POST", self.url + path, content=body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"no complete reply within {self._seconds:g} s")
                if size > MAX_REPLY_BYTES:
                    raise httpx2.ReadError(f"its reply is over {MAX_REPLY_BYTES} bytes")
        return _Answer(response.status_code, b"".join(parts), response.headers.get("Retry-After"))

    def quoted(self, reply: bytes | str) -> str:
        """Return the beginning of a reply for an error message, without the token."""
        text = reply if isinstance(reply, str) else reply.decode("utf-8", "replace")
        return repr(self._hidden(text)[:QUOTED])

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


def refuse_secrets(url: str, token_variable: str | None) -> None:
    """Raise ValueError for credentials in the URL, or for a token where the name of its variable belongs."""
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
        shown = re.sub(r"//.*@", "//", url).partition("?")[0]
        raise ValueError(
            f"url is {shown!r}: it must be http(s)://host:port or http(s)://host/path, "
            "without a user's name, a password or a query"
        )
    if token_variable is not None and not re.fullmatch("[A-Z][A-Z0-9_]*", token_variable):
        raise ValueError(
            "token_variable is not the name of an environment variable in capitals, such as REWARD_TOKEN; "
            "the token itself never stands in a recipe"
        )

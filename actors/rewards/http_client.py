"""HTTP client of a reward service, with time limits and retries, which never shows the token."""

import email.utils
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
QUOTED = 200  # characters of a reply in an error message

MessageT = TypeVar("MessageT", bound=Message)


class RewardServiceFailed(ValueError):
    """The service did not answer, refused, or sent no valid reply. A retry may succeed."""


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    retry_after: str | None


class RewardClient:
    """Connections to a service. A request is retried if the service does not answer, or answers 429 or 5xx."""

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
        """Send a GET, or a POST of `body`, and parse the reply.

        Raises:
            RewardServiceFailed: no reply came, or it is not of type `kind`.
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
        """Return the body of the first answer 200, within the number of attempts."""
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
        """Make one request. The limit is for the full reply, since httpx2's own limit is for each read."""
        deadline, parts, size = time.monotonic() + self._seconds, [], 0
        with self._client.stream("GET" if body is None else "POST", self.url + path, content=body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"no whole reply within {self._seconds:g} s")
                if size > MAX_REPLY_BYTES:
                    raise httpx2.ReadError(f"its reply is over {MAX_REPLY_BYTES} bytes")
        return _Answer(response.status_code, b"".join(parts), response.headers.get("Retry-After"))

    def _quoted(self, body: bytes) -> str:
        return repr(self._hidden(body.decode("utf-8", "replace"))[:QUOTED])

    def _hidden(self, text: str) -> str:
        """Remove the token, which some services repeat when they refuse it."""
        return text.replace(self._token, "…") if self._token else text


def _asked_pause(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After header: a number, or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return 0.0
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())

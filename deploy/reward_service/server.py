"""A small reward service: a reward of the registry behind HTTP. What comes in is never trusted."""

import hmac
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from pydantic import ValidationError

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rewards.reward import RewardMistake
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.reward_protocol import (
    HEALTH_PATH,
    SCORE_PATH,
    Fault,
    Health,
    Message,
    ScoreReply,
    ScoreRequest,
    from_png,
)
from ray_ddpo.common.trajectory import ImageBatch

LOG = logging.getLogger(__name__)
MAX_REQUEST_BYTES = 512_000_000
MAX_IMAGE_PIXELS = 4096 * 4096
MAX_REQUEST_PIXELS = 8 * MAX_IMAGE_PIXELS  # 400 MB unpacked, 512 images of 512 × 512
REQUESTS_AT_ONCE = 4  # held in memory; the next waits with its body unread
QUIET_SECONDS = 60.0  # a connection that says nothing for so long is closed
REQUEST_SECONDS = 300.0  # for a body to arrive, and to wait for a place
PART_BYTES = 65536


class Refusal(Exception):
    """What a request is answered instead of scores."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Serves `worker`'s one reward. Requests are read side by side and scored one after the other."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], worker: RewardWorker, token: str | None, max_bytes: int = MAX_REQUEST_BYTES
    ) -> None:
        super().__init__(address, _Handler)
        (self.reward,) = worker.names
        self.max_bytes = max_bytes
        self.places = threading.BoundedSemaphore(REQUESTS_AT_ONCE)
        self._worker = worker
        self._one_at_a_time = threading.Lock()
        self._token = token

    @property
    def url(self) -> str:
        """Where it is reached on this machine."""
        return f"http://{self.server_address[0]}:{self.server_port}"

    def admits(self, authorization: str | None) -> bool:
        """Whether an Authorization header has the token; any does where none is asked for."""
        given = (authorization or "").encode("latin-1", "replace")
        return self._token is None or hmac.compare_digest(given, f"Bearer {self._token}".encode())

    def score(self, request: ScoreRequest) -> ScoreReply:
        """Refusal: an image is not one, or the reward fails."""
        images = ImageBatch(_unpacked(request.images), tuple(map(Prompt, request.prompts, request.metadata)))
        try:
            with self._one_at_a_time:
                scores = self._worker.score(images).rewards[self.reward].tolist()
        except (ScoringFailed, RewardMistake) as error:
            raise Refusal(500, str(error)) from error
        return ScoreReply(scores=[score if math.isfinite(score) else None for score in scores])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An asker that went away is no error of ours."""
        if isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            LOG.info("%s went away", client_address)
        else:
            super().handle_error(request, client_address)


def _unpacked(images: list[str]) -> np.ndarray:
    left, unpacked = MAX_REQUEST_PIXELS, []
    for index, text in enumerate(images):
        try:
            image = from_png(text, min(left, MAX_IMAGE_PIXELS))
        except ValueError as error:
            raise Refusal(422, f"image {index}: {error}") from error
        if unpacked and image.shape != unpacked[0].shape:
            raise Refusal(422, f"image {index} has another size than image 0: one request has images of one size")
        left -= image.shape[0] * image.shape[1]
        unpacked.append(image)
    return np.stack(unpacked)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "ray-ddpo", ""
    timeout = QUIET_SECONDS
    disable_nagle_algorithm = True  # head and body of a reply are written apart
    _unread = 0  # bytes of the body

    def do_GET(self) -> None:
        self._respond({HEALTH_PATH: lambda: Health(reward=self.server.reward)})

    def do_POST(self) -> None:
        self._respond({SCORE_PATH: self._score})

    def _respond(self, paths: dict[str, Callable[[], Message]]) -> None:
        try:
            self._unread = self._length()
            if not self.server.admits(self.headers.get("Authorization")):
                raise Refusal(401, "a bearer token is needed, and this is none or another")
            if self.path not in paths:
                raise Refusal(404, f"there are {HEALTH_PATH} to GET and {SCORE_PATH} to POST")
            self._send(200, paths[self.path]())
        except Refusal as refusal:
            self._refuse(refusal)

    def _length(self) -> int:
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refusal(411, "a body comes with its Content-Length, and not in chunks")
        text = self.headers.get("Content-Length", "0")
        if not (text.isascii() and text.isdecimal()):
            self.close_connection = True
            raise Refusal(400, "Content-Length is no number of bytes")
        return int(text[:20])

    def _score(self) -> ScoreReply:
        if self._unread > self.server.max_bytes:
            raise Refusal(
                413, f"the request has {self._unread} bytes, and may have {self.server.max_bytes}: send fewer"
            )
        if not self.server.places.acquire(timeout=REQUEST_SECONDS):
            raise Refusal(503, f"{REQUESTS_AT_ONCE} requests are being scored")
        try:
            return self.server.score(ScoreRequest.model_validate_json(self._body()))
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(str(part) for part in fault["loc"]) or "the body"
            raise Refusal(422, f"{place}: {fault['msg']}") from None
        finally:
            self.server.places.release()

    def _body(self) -> bytes:
        body = b"".join(self._parts())
        if self._unread:
            self.close_connection = True
            raise Refusal(408, f"{self._unread} bytes of the body did not come")
        return body

    def _parts(self) -> Iterator[bytes]:
        deadline = time.monotonic() + REQUEST_SECONDS
        while self._unread and time.monotonic() < deadline:
            part = self.rfile.read1(min(self._unread, PART_BYTES))
            if not part:
                return
            self._unread -= len(part)
            yield part

    def _refuse(self, refusal: Refusal) -> None:
        LOG.warning("%s: %s: %s", self.client_address[0], refusal.status, refusal)
        if self._unread:
            self.close_connection = True
        self._send(refusal.status, Fault(error=str(refusal)))

    def _send(self, status: int, reply: Message) -> None:
        body = reply.model_dump_json().encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        more = {401: ("WWW-Authenticate", "Bearer"), 503: ("Retry-After", "1")}
        if status in more:
            self.send_header(*more[status])
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, such as a line that is no request."""
        self.close_connection = True
        self.request_version = self.protocol_version  # else it is taken for HTTP/0.9, which has no status line
        self._refuse(Refusal(code, message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *arguments: Any) -> None:
        LOG.info(format, *arguments)

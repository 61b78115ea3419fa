"""ddpo serve-reward: a recipe's reward behind HTTP, on a machine and in an environment of its own. No input is trusted.

`http.server` stays: aiohttp answers malformed requests in plain text or not at all, drops clients that half-close, and
limits neither the time of a body nor silent connections, so its handlers would be no shorter than these.
"""

import hmac
import ipaddress
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from pydantic import ValidationError

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rewards.frames import FrameScoring
from ray_ddpo.actors.rewards.http import Http
from ray_ddpo.actors.rewards.reward import RewardMistake
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.reward_protocol import (
    HEALTH_PATH,
    SCORE_PATH,
    Fault,
    Health,
    Message,
    ScoreReply,
    ScoreRequest,
    from_png,
    read_token,
)
from ray_ddpo.common.trajectory import ImageBatch
from ray_ddpo.deploy.driver.components import build_reward

LOG = logging.getLogger(__name__)
MAX_REQUEST_BYTES = 512_000_000
MAX_IMAGE_PIXELS = 4096 * 4096
MAX_REQUEST_PIXELS = 8 * MAX_IMAGE_PIXELS  # 400 MB decoded: 512 images of 512 × 512
REQUESTS_AT_ONCE = 4  # in memory; further requests wait with their bodies unread
QUIET_SECONDS = 60.0  # a connection that sends nothing for this long is closed
REQUEST_SECONDS = 300.0  # for a body to arrive, and for a free slot
PART_BYTES = 65536


class Refusal(Exception):
    """An HTTP error status with its reason, in place of scores."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Server of a worker's only reward. Requests are read concurrently and scored one after the other."""

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
        """Return the server's URL on this machine."""
        return f"http://{self.server_address[0]}:{self.server_port}"

    def admits(self, authorization: str | None) -> bool:
        """Return whether an Authorization header has the token. Every header does if the server has none."""
        given = (authorization or "").encode("latin-1", "replace")
        return self._token is None or hmac.compare_digest(given, f"Bearer {self._token}".encode())

    def score(self, request: ScoreRequest) -> ScoreReply:
        """Score the images, or the clips, of a request.

        Raises:
            Refusal: an image cannot be decoded or is too large, or the reward fails.
        """
        pixels = _decoded(request.images)
        if request.frames is not None:
            pixels = pixels.reshape(-1, request.frames, *pixels.shape[1:])
        images = ImageBatch(pixels, tuple(map(Prompt, request.prompts, request.metadata)))
        try:
            with self._one_at_a_time:
                scores = self._worker.score(images).rewards[self.reward].tolist()
        except (ScoringFailed, RewardMistake) as error:
            raise Refusal(500, str(error)) from error
        return ScoreReply(scores=[score if math.isfinite(score) else None for score in scores])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a client that closed its connection; it is not an error of the server."""
        if isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            LOG.info("%s went away", client_address)
        else:
            super().handle_error(request, client_address)


def _decoded(images: list[str]) -> np.ndarray:
    """Decode PNG images of one size, and refuse them before decoding if they have too many pixels together."""
    left, decoded = MAX_REQUEST_PIXELS, []
    for index, text in enumerate(images):
        try:
            image = from_png(text, min(left, MAX_IMAGE_PIXELS))
        except ValueError as error:
            raise Refusal(422, f"image {index}: {error}") from error
        if decoded and image.shape != decoded[0].shape:
            raise Refusal(422, f"image {index} has another size than image 0: one request has images of one size")
        left -= image.shape[0] * image.shape[1]
        decoded.append(image)
    return np.stack(decoded)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "ray-ddpo", ""
    timeout = QUIET_SECONDS
    disable_nagle_algorithm = True  # headers and body of a reply are written separately
    _unread = 0  # bytes of the body that were not read yet

    def do_GET(self) -> None:
        self._respond({HEALTH_PATH: lambda: Health(reward=self.server.reward)})

    def do_POST(self) -> None:
        self._respond({SCORE_PATH: self._score})

    def _respond(self, paths: dict[str, Callable[[], Message]]) -> None:
        """Check length, token and path in this order, and send the reply."""
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
        """Return the length of the body. Without a known length the connection cannot be used again."""
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refusal(411, "a body comes with its Content-Length, and not in chunks")
        text = self.headers.get("Content-Length", "0")
        if not (text.isascii() and text.isdecimal()):
            self.close_connection = True
            raise Refusal(400, "Content-Length is no number of bytes")
        return int(text[:20])

    def _score(self) -> ScoreReply:
        """Read and score the request, if its size is allowed and a slot is free."""
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
        """Read the body; refuse a body that is not complete after REQUEST_SECONDS or when the client closes."""
        deadline, body = time.monotonic() + REQUEST_SECONDS, bytearray()
        while self._unread and time.monotonic() < deadline:
            part = self.rfile.read1(min(self._unread, PART_BYTES))
            if not part:
                break
            self._unread -= len(part)
            body += part
        if self._unread:
            self.close_connection = True
            raise Refusal(408, f"{self._unread} bytes of the body did not come")
        return bytes(body)

    def _refuse(self, refusal: Refusal) -> None:
        LOG.warning("%s: %s: %s", self.client_address[0], refusal.status, refusal)
        if self._unread:
            self.close_connection = True
        self._send(refusal.status, Fault(error=str(refusal)))

    def _send(self, status: int, reply: Message) -> None:
        """Send a JSON reply with its headers."""
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
        """Answer in JSON what the standard library refuses, such as a malformed request line."""
        self.close_connection = True
        self.request_version = self.protocol_version  # HTTP/0.9 replies have no status line
        self._refuse(Refusal(code, message or HTTPStatus(code).phrase))

    def log_message(self, template: str, *arguments: Any) -> None:
        LOG.info(template, *arguments)


def serve_reward(recipe: Recipe, name: str | None, host: str, port: int, token_variable: str | None) -> None:
    """Serve one of the recipe's rewards until a signal ends the process.

    Args:
        recipe: with the reward.
        name: the reward's; it may be left out if the recipe has one reward.
        host: the address to listen at.
        port: 0: any free port.
        token_variable: the environment variable with the token that clients must send.

    Raises:
        ValueError: the recipe has several rewards and none is named, the reward cannot be loaded, or the host can be
            reached from elsewhere and no token is asked for.
    """
    server = reward_server(recipe, name, host, port, token_variable)
    asked = f"the token in {token_variable}" if token_variable else "no token"
    print(f"serving {server.reward} at {server.url}{SCORE_PATH}, asking for {asked}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        server.server_close()


def reward_server(recipe: Recipe, name: str | None, host: str, port: int, token_variable: str | None) -> RewardServer:
    """Load the reward, and bind the server to its port; see `serve_reward`."""
    token = read_token(token_variable, os.environ)
    if token is None and not _is_this_machine(host):
        raise ValueError(f"--host {host} can be reached from elsewhere: give --token-variable, too")
    tables = {table.called: table for table in recipe.all_rewards}
    if name is None and len(tables) == 1:
        (name,) = tables
    if name not in tables:
        raise ValueError(f"--reward is {name!r}: the recipe has {sorted(tables)}")
    table, reward = tables[name], build_reward(tables[name])
    if isinstance(reward, Http):
        raise ValueError("the recipe's reward is itself asked for over HTTP: give a recipe with the reward to serve")
    pool, frames = table.workers or recipe.reward_workers, {table.called: FrameScoring.of(table)}
    worker = RewardWorker({table.called: reward}, pool, recipe.runtime, frames=frames)
    try:
        return RewardServer((host, port), worker, token)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error}") from error


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

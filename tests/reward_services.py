"""Reward services on real sockets: the shipped one around any reward, and a scripted one."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.deploy.reward_service import MAX_REQUEST_BYTES, RewardServer


@contextmanager
def running(server: http.server.HTTPServer) -> Iterator[str]:
    """Serve in a thread and return the service's URL."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(
    reward: Reward, token: str | None = None, port: int = 0, max_bytes: int = MAX_REQUEST_BYTES, name: str = "served"
) -> Iterator[str]:
    """Run the shipped service around a reward."""
    worker = RewardWorker({name: reward}, RewardPoolTable(), RuntimeTable(device="cpu"))
    with running(RewardServer(("127.0.0.1", port), worker, token, max_bytes)) as url:
        yield url


@dataclass
class Request:
    """A request to a scripted service."""

    path: str
    headers: Message
    body: bytes


Answer = tuple[int, bytes, dict[str, str]] | Callable[["Scripted"], None]


@dataclass
class Script:
    """Answers in order, of which the last repeats. A function gets the handler and writes to its socket itself."""

    answers: list[Answer]
    asked: list[Request] = field(default_factory=list)


class Scripted(http.server.BaseHTTPRequestHandler):
    script: Script

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answers = self.script.answers
        answer = answers[min(len(self.script.asked), len(answers) - 1)]
        self.script.asked.append(Request(self.path, self.headers, body))
        if callable(answer):
            answer(self)
            return
        status, reply, headers = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = _answer

    def log_message(self, *_: object) -> None:
        """Keep requests out of the tests' output."""


@contextmanager
def scripted(*answers: Answer) -> Iterator[tuple[str, Script]]:
    """Run a service with these answers. Return its URL and its requests so far."""
    script = Script(list(answers))
    handler = type("Handler", (Scripted,), {"script": script})
    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        yield url, script

"""An object store that can be told to refuse: a proxy in front of a real one, which answers with a status or not at all."""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class RefusingStore:
    """Passes every request on; while `status` is set it answers with that instead, to requests that change something."""

    def __init__(self, endpoint: str) -> None:
        self.status: int | None = None
        self.refused = 0
        self._target = urlsplit(endpoint).netloc
        self._server = self._listening(0)
        self.port: int = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def _listening(self, port: int) -> ThreadingHTTPServer:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if store.status is not None:
                    store.refused += 1
                    status, headers, answer = store.status, [], b""
                else:
                    connection = http.client.HTTPConnection(store._target, timeout=30)
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    status, headers, answer = response.status, response.getheaders(), response.read()
                    connection.close()
                self.send_response_only(status)
                skipped = ("transfer-encoding", "connection") + (() if self.command == "HEAD" else ("content-length",))
                for name, value in headers:
                    if name.lower() not in skipped:
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def hang_up(self) -> None:
        """Listen no longer: connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def listen(self) -> None:
        """Listen again, on the same port."""
        self._server = self._listening(self.port)


@contextmanager
def refusing_store(endpoint: str) -> Iterator[RefusingStore]:
    """A proxy in front of the store at `endpoint`."""
    store = RefusingStore(endpoint)
    try:
        yield store
    finally:
        store.hang_up()

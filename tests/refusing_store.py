"""A relay in front of a real object store that can refuse requests: it answers with a status, or not at all."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

CHUNK = 2**16
HEADERS_END = b"\r\n\r\n"


class RefusingStore:
    """A relay of bytes in both directions. While `status` is set, every request gets that status."""

    def __init__(self, endpoint: str) -> None:
        self.refused = 0
        self._status: int | None = None
        target = urlsplit(endpoint)
        self._target = (target.hostname, target.port)
        self._open: set[socket.socket] = set()
        self._server = self._listening(0)
        self.port: int = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    @property
    def status(self) -> int | None:
        return self._status

    @status.setter
    def status(self, status: int | None) -> None:
        self._status = status
        for each in list(self._open):  # or requests on an open connection would be served still
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _listening(self, port: int) -> socketserver.ThreadingTCPServer:
        store = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    if store.status is None:
                        store._relay(self.request)
                    else:
                        store._refuse(self.request, store.status)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True

        server = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def _refuse(self, client: socket.socket, status: int) -> None:
        request = b""
        while HEADERS_END not in request and (data := client.recv(CHUNK)):
            request += data
        self.refused += 1
        client.sendall(f"HTTP/1.1 {status} Refused\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        client.shutdown(socket.SHUT_WR)
        client.settimeout(1)
        while client.recv(CHUNK):  # what is left of the body; closed too early, the answer would be lost
            pass

    def _relay(self, client: socket.socket) -> None:
        with socket.create_connection(self._target) as server:
            self._open |= {client, server}
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join()
            self._open -= {client, server}

    def hang_up(self) -> None:
        """Stop listening, so that connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self.status = self.status  # closes what is open

    def listen(self) -> None:
        """Listen again, on the same port."""
        self._server = self._listening(self.port)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def refusing_store(endpoint: str) -> Iterator[RefusingStore]:
    """Start a relay in front of the store at `endpoint`."""
    store = RefusingStore(endpoint)
    try:
        yield store
    finally:
        store.hang_up()

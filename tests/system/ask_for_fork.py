"""Start a Ray worker as a fork of the tests' forking process. Ray runs this file in place of its setup_worker.py."""

import json
import os
import socket
import sys

FORKS_AT = "DDPO_TEST_FORKS_AT"  # path of the forking process's socket
SETUP_WORKER = "DDPO_TEST_SETUP_WORKER"  # path of Ray's setup_worker.py
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="


def main() -> None:
    """Send this process's command, environment and output to the forking process, and end."""
    command = sys.argv[1:]
    if any(word.startswith(CONTEXT) and word != f"{CONTEXT}{{}}" for word in command):  # a runtime environment
        os.execv(sys.executable, [sys.executable, os.environ[SETUP_WORKER], *command])
    words = [word for word in command if not word.startswith((CONTEXT, LANGUAGE))]
    request = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[FORKS_AT])
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(request)
        connection.recv(1)  # returns when the fork has read the request


if __name__ == "__main__":
    main()

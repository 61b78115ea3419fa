"""Start a Ray worker or `ddpo` as a fork of the tests' forking process. Ray runs this file for its setup_worker.py."""

import json
import os
import socket
import sys

FORKS_AT = "DDPO_TEST_FORKS_AT"  # path of the forking process's socket
SETUP_WORKER = "DDPO_TEST_SETUP_WORKER"  # path of Ray's setup_worker.py
PROGRAM = "--program"  # before the path of a Python program, whose exit code is awaited
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="


def main() -> None:
    """Send this process's command, environment and output to the forking process, and end."""
    command = sys.argv[1:]
    if any(word.startswith(CONTEXT) and word != f"{CONTEXT}{{}}" for word in command):  # a runtime environment
        os.execv(sys.executable, [sys.executable, os.environ[SETUP_WORKER], *command])
    words = [word for word in command if not word.startswith((CONTEXT, LANGUAGE))]
    is_program = words[0] == PROGRAM
    request = json.dumps([words[is_program:], dict(os.environ), os.getcwd(), is_program]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[FORKS_AT])
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(request)
        ended = connection.recv(1)  # when the fork has read the request, or with the exit code of a program
    sys.exit(ended[0] if ended else int(is_program))


if __name__ == "__main__":
    main()

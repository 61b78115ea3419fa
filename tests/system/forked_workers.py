"""Workers of the tests' own Ray clusters, forked from one process that has imported torch, diffusers and the roles.

A usual worker imports for five seconds of a core. The clusters of `ray start` and of `ddpo train` as a program, which
other tests start, have usual workers.

Ray runs this file in place of its setup_worker.py. The file sends its command, environment and output to the forking
process. A worker with a runtime environment is left to setup_worker.py.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORKS_AT = "DDPO_TEST_FORKS_AT"  # path of the forking process's socket
SETUP_WORKER = "DDPO_TEST_SETUP_WORKER"  # path of Ray's setup_worker.py
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
# Without Ray, which reads environment variables of the worker while it is imported.
IMPORTED = (
    *("ray_ddpo.actors.sampler", "ray_ddpo.actors.reward_worker", "ray_ddpo.learner.learner", "peft"),
    *("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.models.unets.unet_2d_condition"),
    *("diffusers.models.autoencoders.autoencoder_tiny", "diffusers.schedulers.scheduling_ddim"),
)
SPACE_FOR_TITLES = "_" * 1000  # a process's title must fit into its command line


@contextmanager
def forked_workers(folder: str) -> Iterator[None]:
    """Give the clusters that this process starts forked workers. `folder` holds the socket."""
    import ray._private.ray_constants as constants

    setup, path = constants.SETUP_WORKER_FILENAME, os.path.join(folder, "forks")
    os.environ[SETUP_WORKER] = os.path.join(os.path.dirname(constants.__file__), "workers", setup)
    os.environ[FORKS_AT] = path
    # Ray sets the threads in a worker with one CPU before torch is imported.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        command = [sys.executable, "-m", "tests.system.forked_workers", str(listening.fileno()), SPACE_FOR_TITLES]
        forking = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            env=environment,
            cwd=Path(__file__).parents[2],
        )
    constants.SETUP_WORKER_FILENAME = __file__
    try:
        with forking:
            yield
    finally:
        constants.SETUP_WORKER_FILENAME = setup


def serve(listening: socket.socket) -> None:
    """Fork a worker at each request. End when standard input is closed."""
    importlib.import_module("ray_ddpo.common.diffusion.policy").quiet_libraries()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the kernel removes ended workers
    while listening in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        with connection:
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                become_worker(connection)


def become_worker(connection: socket.socket) -> None:
    """Take over the command, environment and output of a request, and run Ray's default_worker.py."""
    size, outputs, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as request:
        command, environment, folder = json.loads(request.read(int.from_bytes(size, "big")))
    connection.close()
    for number, output in enumerate(outputs):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[0] = command, os.path.dirname(command[0])
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


def ask_for_a_fork() -> None:
    """Send this process's command to the forking process, and end."""
    command = sys.argv[1:]
    if any(word.startswith(CONTEXT) and word != f"{CONTEXT}{{}}" for word in command):
        os.execv(sys.executable, [sys.executable, os.environ[SETUP_WORKER], *command])
    words = [word for word in command if not word.startswith((CONTEXT, LANGUAGE))]
    request = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[FORKS_AT])
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(request)
        connection.recv(1)  # returns when the fork has read the request


if __name__ == "__main__":
    if sys.argv[-1] == SPACE_FOR_TITLES:
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        ask_for_a_fork()

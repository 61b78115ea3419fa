"""Workers of Ray and the program `ddpo`, forked from one process that has imported torch, diffusers and the roles.

A usual worker or command imports for five seconds of a core. The clusters of `ray start`, of several nodes, and of a
`ddpo train` that is no fork have usual workers, and other tests use those.
"""

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from tests.system import ask_for_fork
from tests.system.ask_for_fork import FORKS_AT, PROGRAM, SETUP_WORKER

# Without Ray, which reads environment variables of the worker while it is imported.
IMPORTED = (
    *("ray_ddpo.actors.sampler", "ray_ddpo.actors.reward_worker", "ray_ddpo.learner.learner", "peft"),
    *("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.models.unets.unet_2d_condition"),
    *("diffusers.models.autoencoders.autoencoder_tiny", "diffusers.schedulers.scheduling_ddim"),
)
SPACE_FOR_TITLES = "_" * 1000  # a process's title must fit into its command line


@contextmanager
def forking_process(folder: str) -> Iterator[None]:
    """Start the process that forks, and end it. `folder` holds its socket."""
    path = os.environ[FORKS_AT] = os.path.join(folder, "forks")
    # Ray sets the threads in a worker with one CPU before torch is imported.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        number = listening.fileno()
        command = [sys.executable, "-m", "tests.system.forked_workers", str(number), SPACE_FOR_TITLES]
        root = Path(__file__).parents[2]
        forking = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number], env=environment, cwd=root)
    with forking:
        yield


@contextmanager
def forked_workers() -> Iterator[None]:
    """Give the clusters that the body starts forked workers, for as long as the clusters live."""
    from ray._private import ray_constants

    own = os.path.join(os.path.dirname(ray_constants.__file__), "workers", ray_constants.SETUP_WORKER_FILENAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SETUP_WORKER, own)
        patch.setattr(ray_constants, "SETUP_WORKER_FILENAME", ask_for_fork.__file__)
        yield


def forked_program(folder: Path) -> dict[str, str]:
    """Write a `ddpo` that is forked, and so are the workers of its cluster. Return an environment that finds it first.

    Needs the forking process. On a machine with a GPU the environment finds the usual program.
    """
    programs = Path(sys.executable).parent
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    # A process that has looked for a GPU cannot be forked for work on one.
    if not torch.cuda.is_available():
        words = shlex.join([sys.executable, "-S", ask_for_fork.__file__, PROGRAM, str(programs / "ddpo")])
        (folder / "ddpo").write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (folder / "ddpo").chmod(0o755)
        path = f"{folder}{os.pathsep}{path}"
    return {**os.environ, "PATH": path}


def serve(listening: socket.socket) -> None:
    """Fork a worker or a program at each request. End when standard input is closed."""
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
                become_worker_or_program(connection)


def become_worker_or_program(connection: socket.socket) -> None:
    """Take over the command, environment and output of a request, and run Ray's default_worker.py or the program."""
    size, outputs, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as request:
        command, environment, folder, is_program = json.loads(request.read(int.from_bytes(size, "big")))
    if is_program and (program := os.fork()):
        connection.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) % 256]))
        os._exit(0)
    connection.close()
    for number, output in enumerate(outputs):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[0] = command, os.path.dirname(command[0])
    with forked_workers() if is_program else nullcontext():
        runpy.run_path(command[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

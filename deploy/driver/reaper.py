"""Reaper: a process that outlives a driver on Ray, and ends what a local cluster would leave behind.

Ray ends a driver from C++ if it loses the GCS or the object store, and a driver may be killed. Then Python cannot
clean up.
"""

import atexit
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import psutil

POLL_SECONDS = 2.0
ORDERLY = b"orderly\n"
UNEXPECTED = (
    "ddpo: the driver was ended from outside or by Ray, as when it is killed, out of memory or has lost its cluster: "
    "resume with --resume auto"
)


_reapers: list[subprocess.Popen] = []  # one for each cluster that this process has started or joined


def start_reaper(roots: list[psutil.Process]) -> None:
    """Start a reaper for this process; `roots` are the cluster processes that this process has started."""
    command = [sys.executable, str(Path(__file__)), *(str(root.pid) for root in roots)]
    _reapers.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
    atexit.register(_before_ray_is_shut_down)  # handlers run last in, first out, and Ray's is registered by its import


def has_cluster() -> bool:
    """Return whether this process has started or joined a cluster."""
    return bool(_reapers)


def leave(code: int) -> NoReturn:
    """End this process at once, without Ray's shutdown, which waits for a cluster that may be gone."""
    _expect_end()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the stream was closed
            stream.flush()
    os._exit(code)


def _before_ray_is_shut_down() -> None:
    _expect_end()
    if (
        threading.current_thread() is threading.main_thread()
    ):  # else an interrupt during the shutdown prints a traceback
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))


def _expect_end() -> None:
    """Tell the reapers that the driver ends by itself, so that they print nothing."""
    for process in _reapers:
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # the reaper was killed
            process.stdin.write(ORDERLY)
            process.stdin.flush()


def family(driver: psutil.Process, roots: set[int]) -> set[psutil.Process]:
    """Return the living processes with these ids and all of their descendants, without the driver's other children."""
    found, pids = set(), set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in driver.children(recursive=True):  # parents come before their children
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid in roots or process.ppid() in pids:
                    pids.add(process.pid)
                    found.add(process)
    return found


def reap(roots: set[int]) -> None:
    """Wait for the parent process to end, then kill the remaining cluster processes."""
    driver = psutil.Process().parent()
    known: set[psutil.Process] = set()
    said = b""
    while driver is not None:
        known = {process for process in known if process.is_running()} | family(driver, roots)
        if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            read = sys.stdin.buffer.raw.read(1024)  # type: ignore[attr-defined]
            if not read:
                break
            said += read
    if ORDERLY not in said:
        print(UNEXPECTED, file=sys.stderr, flush=True)
    for process in known:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
    ):  # meant for the driver; the reaper ends after the driver
        signal.signal(number, signal.SIG_IGN)
    reap({int(pid) for pid in sys.argv[1:]})

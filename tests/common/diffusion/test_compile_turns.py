"""Compiling in turns: one process first and alone, the others at once when it has ended, in any order of events."""

import threading
import time
from pathlib import Path

import pytest
import torch

from ray_ddpo.common.diffusion.compile_turns import compile_in_turn
from tests.accepted_page import assert_refused

PROCESSES = 4


class Clock:
    """The times at which stand-in processes began and ended to compile. Threads do, as each opens the lock's file."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.together = threading.Barrier(PROCESSES - 1, timeout=20)

    def compile(self) -> None:
        self.begun.append(time.monotonic())
        if len(self.begun) == 1:
            time.sleep(0.2)  # all others have begun to wait
        else:
            self.together.wait()  # passes only if all others compile at the same time
        self.ended.append(time.monotonic())


def test_the_first_compiles_alone_and_the_others_then_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    threads = [
        threading.Thread(target=compile_in_turn, args=("sampler", "key", clock.compile, tmp_path))
        for _ in range(PROCESSES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(clock.ended) == PROCESSES
    assert min(clock.begun[1:]) >= clock.ended[0]
    printed = capsys.readouterr().out
    assert printed.count("compiling the sampler's network (first on this machine; the others take its cache) …") == 1
    assert printed.count("compiling the sampler's network (from this machine's cache) …") == PROCESSES - 1
    assert printed.count("compiled the sampler's network in 0 s") == PROCESSES
    before = len(clock.begun)
    compile_in_turn("sampler", "key", lambda: clock.begun.append(0.0), tmp_path)
    assert len(clock.begun) == before + 1 and "waiting" not in capsys.readouterr().out


def test_a_process_that_fails_leaves_its_place_to_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("no C compiler")

    with pytest.raises(RuntimeError, match="no C compiler"):
        compile_in_turn("learner", "key", fail, tmp_path)
    capsys.readouterr()
    compile_in_turn("learner", "key", lambda: None, tmp_path)
    assert "first on this machine" in capsys.readouterr().out


def test_networks_of_other_keys_do_not_wait(tmp_path: Path) -> None:
    def inner() -> None:
        compile_in_turn("learner", "other", lambda: None, tmp_path)

    thread = threading.Thread(target=compile_in_turn, args=("sampler", "key", inner, tmp_path), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_network_that_torch_cannot_compile_is_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    def network(inputs: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return inputs + 1

    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with pytest.raises(ValueError) as error:
        compile_in_turn("learner", "key", lambda: compiled(torch.zeros(1)), tmp_path)
    assert_refused("a network that torch cannot compile", str(error.value))
    with pytest.raises(ValueError, match='give policy.compile = "none", or policy.compile_blocks = true'):
        compile_in_turn("sampler", "key", lambda: compiled(torch.zeros(1)), tmp_path)

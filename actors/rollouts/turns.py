"""Turns: samplers and learner ranks that share GPUs work one after the other, and give each other the GPU's memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from ray_ddpo.actors.rollouts.sampling_scheduler import SamplingScheduler
from ray_ddpo.actors.rollouts.worker_pool import WorkerPool
from ray_ddpo.common.process_deaths import PROCESS_ENDED

SLEEP_SECONDS = 60.0  # for an idle sampler to return its memory; then its process is taken to hang
AT = "at the end of its turn"
# Waits until one of some references is ready or a moment has passed, with the reason to wait in words.
Wait = Callable[[tuple[Any, ...], str], None]


class Turns:
    """The samplers' turn and the learner's.

    The samplers' turn lasts until nothing is left to sample: the round, evaluations queued behind it, and copies of
    stragglers' tasks. So evaluation tasks run while the round's last images are scored. In the learner's turn no
    sampler starts a task. Scoring goes on in both. The schedule decides what each task computes, so turns change no bit.

    A sampler that dies is replaced in either turn. Loading takes the memory of weights, which both keep in all turns.
    """

    def __init__(self, sampling: SamplingScheduler, samplers: WorkerPool, wait: Wait) -> None:
        self._sampling = sampling
        self._samplers = samplers
        self._wait = wait

    @contextmanager
    def learner(self) -> Iterator[None]:
        """Wait for the end of the samplers' turn and let them sleep; then the body is the learner's turn."""
        while not self._sampling.is_idle:
            self._wait((), "the learner waits for the samplers, whose GPUs it shares")
            self._sampling.give_up_on_needless(time.monotonic())
        self._sampling.is_paused = True
        try:
            self._sleep()
            yield
        finally:
            self._sampling.is_paused = False

    def _sleep(self) -> None:
        """Let all samplers return the memory of their activations. Those that do not answer are replaced."""
        asked = {sampler.actor.sleep.remote(): sampler for sampler in self._samplers.loaded}
        deadline = time.monotonic() + SLEEP_SECONDS
        while asked:
            done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0, fetch_local=False)
            for reference in done:
                sampler = asked.pop(reference)
                try:
                    ray.get(reference)
                except PROCESS_ENDED as error:
                    self._samplers.lost(sampler, str(error), AT)
            if asked and time.monotonic() > deadline:
                for sampler in asked.values():
                    self._samplers.lost(sampler, f"no answer for {SLEEP_SECONDS:.0f} s", AT)
                return
            if asked:
                self._wait(tuple(asked), "the samplers return their memory to the learner")

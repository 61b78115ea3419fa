"""The cause of a process's death, from Ray 2.60's texts."""

import pytest

from ray_ddpo.common.process_deaths import Death, cause_of, in_one_line

CRASH = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)
SAYS = "The actor died unexpectedly before finishing this task.\n\tclass_name: Sampler\n"


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (SAYS + "Worker exits unexpectedly. Worker exits with an exit code 4.", "exit code 4"),
        (SAYS + "SystemExit is raised. Exit code: 1. The process receives a SIGTERM.", "SIGTERM"),
        (SAYS + "Worker exit type: NODE_OUT_OF_MEMORY", "ended by Ray, because its machine ran low on memory"),
        (SAYS + "The actor is dead because its node has died.", "its machine is gone"),
        (SAYS + CRASH, None),
        (
            "1 worker(s) were killed due to the node running low on memory. Memory on the node was 22 GB of 23 GB",
            "ended by Ray, because its machine ran low on memory",
        ),
        ("no answer for 60 s", "no answer for 60 s"),
        (
            SAYS + "Something that Ray says from its next version on.",
            "Something that Ray says from its next version on.",
        ),
    ],
)
def test_a_death_is_told_in_a_few_words(reason: str, cause: str | None) -> None:
    assert cause_of(reason) == cause
    assert "\n" not in in_one_line(reason)
    assert Death(0, reason, "").by_driver == (reason == "no answer for 60 s")

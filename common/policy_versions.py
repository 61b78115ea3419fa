"""Policy versions: which version a round is sampled with, which version it makes, and how long a version is kept.

A policy version is the number of rounds that its weights were trained on. Version 0 has not been trained. So the state
after n rounds, a checkpoint of n rounds and version n are the same moment of a run. With L = `max_policy_lag`:

| question | answer | function |
|---|---|---|
| Which version is round r sampled with? | r − L, but not below 0 | `policy_version` |
| Which rounds may start once version v is published? | those up to v + L | `last_startable_round` |
| Which version does the update of round r make? | r + 1 | `version_after` |
| How far is a task behind the learner? | r minus the version that it was sampled with, at most L | `lag_of` |
| Which versions are kept after n rounds? | n − L … n, because round n needs n − L | `kept_versions` |
| After which round is version v evaluated? | the last round that version v lets start | `evaluation_round` |

Only the learner keeps versions, in its state. The driver gets a round's version from there and submits it with the
round's tasks, so no sampler, stream or scheduler chooses a version. Each sampler refuses weights of another version
than its task's. The learner compares the fingerprint in each task's report with the version that it keeps.

Pure arithmetic: no torch, no Ray, no clock.
"""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def policy_version(round_index: int, max_policy_lag: int) -> int:
    """Return the version that a round is sampled with: `max_policy_lag` behind, but not below the first."""
    return max(0, round_index - max_policy_lag)


def last_startable_round(version: int, max_policy_lag: int) -> int:
    """Return the last round whose tasks may start once `version` is published. This is the back-pressure."""
    return version + max_policy_lag


def version_after(round_index: int) -> int:
    """Return the version that the update of a round makes."""
    return round_index + 1


def lag_of(round_index: int, version: int) -> int:
    """Return the number of rounds that a task's version is behind the learner, which trains on `round_index`."""
    return round_index - version


def kept_versions(published: Sequence[T], max_policy_lag: int) -> tuple[T, ...]:
    """Return the published versions that a round may still be sampled with.

    Args:
        published: versions in order, the newest last.
    """
    return tuple(published[-num_kept(max_policy_lag) :])


def num_kept(max_policy_lag: int) -> int:
    """Return the number of versions that the learner keeps and a checkpoint holds, and of rounds in flight."""
    return max_policy_lag + 1


def evaluation_round(version: int, max_policy_lag: int, rounds_done: int) -> int:
    """Return the round after which an evaluation is read. Its tasks come behind that round's training tasks.

    Rounds up to `last_startable_round` are queued already when the version is published, so evaluation comes behind
    them. If the version was published before the run resumed, its evaluation comes behind the next round.
    """
    return max(rounds_done, last_startable_round(version, max_policy_lag))

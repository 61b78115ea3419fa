"""A few random schedules of `make chaos`, with short suspensions."""

import os
from pathlib import Path

import pytest

from tests.system.chaos import VICTIMS, Chaos, chaos_tables, schedules

SCHEDULES = 2  # of those that `make chaos` has thirty of, with seeds of its own
SEED = 1
SUSPENDED_SECONDS = 6.0
ROUNDS = 4


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_whatever_process_is_killed_or_suspended_a_run_arrives_at_the_same_bits(tables: dict, tmp_path: Path) -> None:
    seed = int(os.environ.get("DDPO_CHAOS_SEED", SEED))
    with Chaos(tmp_path, chaos_tables(tables, ROUNDS, watchdog_seconds=60.0)) as chaos:
        for schedule in schedules(SCHEDULES, seed, ROUNDS, SUSPENDED_SECONDS):
            outcome = chaos.run(schedule)
            assert not outcome.problems, f"{schedule}, with seed {seed}: {outcome}"


def test_every_process_has_its_turn_before_one_has_it_again() -> None:
    sampled = schedules(28, seed=1, rounds=4, suspended_seconds=40.0)
    for half in (sampled[:14], sampled[14:]):
        assert {(each.victim, each.suspended_seconds > 0) for each in half} == {
            (victim, suspended) for victim in VICTIMS for suspended in (False, True)
        }
    assert schedules(5, 2, 4, 6.0) == schedules(5, 2, 4, 6.0) != schedules(5, 3, 4, 6.0)

"""The restart budget limits and counts deaths between two rounds, by role, and forgets those of earlier rounds."""

import pytest

from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, TooManyRestarts


def test_deaths_are_counted_by_role_since_the_last_report() -> None:
    budget = RestartBudget(10)
    for role in ("sampler", "learner", "sampler"):
        budget.spend(role, "killed")
    assert budget.report() == {"sampler": 2, "learner": 1}
    assert budget.report() == {}


def test_too_many_deaths_without_a_round_done_end_the_run_with_the_last_reason() -> None:
    budget = RestartBudget(2)
    budget.spend("sampler", "killed")
    budget.spend("reward_worker", "killed")
    with pytest.raises(TooManyRestarts, match="died 3 times .*max_restarts = 2; the last was a learner: out of memory"):
        budget.spend("learner", "out of memory")


def test_deaths_in_a_row_while_a_role_loads_end_the_run_soon() -> None:
    budget = RestartBudget(100)
    budget.spend("sampler", "killed", loads=3)
    budget.spend("learner", "killed", loads=3)
    budget.spend("sampler", "killed", loads=3)
    budget.spend("sampler", "killed")  # one that was loaded
    for _ in range(2):
        budget.spend("sampler", "killed", loads=3)
    with pytest.raises(TooManyRestarts, match="the sampler died 3 times in a row while it was loading, .*: SIGSEGV; "):
        budget.spend("sampler", "SIGSEGV", loads=3)


def test_a_round_done_forgives_the_deaths_before_it() -> None:
    budget = RestartBudget(1)
    for _ in range(5):
        budget.spend("sampler", "killed")
        budget.report()

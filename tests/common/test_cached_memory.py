"""Cached memory goes back to the GPU by these steps, in this order, and only where a GPU is used."""

import pytest
import torch

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.cached_memory import return_cached_memory
from ray_ddpo.common.diffusion import policy
from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.learner.learner import Learner


def test_garbage_is_collected_before_the_cache_is_emptied() -> None:
    done: list[str] = []
    return_cached_memory(lambda: True, lambda: done.append("collect"), lambda: done.append("empty"))
    assert done == ["collect", "empty"]


def test_a_process_without_a_gpu_has_nothing_to_return() -> None:
    done: list[str] = []
    return_cached_memory(lambda: False, lambda: done.append("collect"), lambda: done.append("empty"))
    assert not done
    return_cached_memory()
    assert not torch.cuda.is_initialized(), "looking for it must not create a context"


@pytest.mark.parametrize("role", [Sampler, Learner])
def test_a_role_that_sleeps_returns_its_memory(role: type, monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[bool] = []
    monkeypatch.setattr(policy, "return_cached_memory", lambda: returned.append(True))
    sleeper = object.__new__(role)
    sleeper._policy = object.__new__(DiffusersPolicy)
    sleeper.sleep()
    assert returned == [True]

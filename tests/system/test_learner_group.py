"""The learner's ranks as the driver sees them: repaired failures, raised failures, and no endless waits."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from torch.distributed import DistBackendError

from ray_ddpo.common.policy_weights import PolicyWeights, pack
from ray_ddpo.common.process_deaths import Death
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.learner_group import TrajectoriesLost
from ray_ddpo.learner.process_group import OtherRankFailed
from ray_ddpo.learner.ray_learner_group import RayLearnerGroup
from ray_ddpo.learner.weight_check import WeightsDidNotArrive

pytestmark = pytest.mark.system
BATCH = TrainBatch(3, (), np.zeros(0))
FOR_EVER = 600.0


def moments_of(rank: int) -> dict[str, np.ndarray]:
    return {f"of rank {rank}/step": np.array(rank)}


def state_with(value: float) -> LearnerState:
    return LearnerState(1, (pack(1, {"weight": np.full(1, value, np.float32)}),), moments_of(0), {})


class Rank:
    """Learns nothing. Of the first generation, each does at its update what its `fate` says."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.take_fate("")

    def take_fate(self, fate: str) -> None:
        """Begin as new: a process costs seconds, so those that are left of a test are the next one's."""
        self._fate = fate
        self._loaded = 0.0
        self._slept = 0

    def ready(self) -> bool:
        return True

    def join(self, rendezvous: str) -> None:
        assert ":" in rendezvous

    def sleep(self) -> None:
        self._slept += 1

    def slept(self) -> int:
        """How often it has returned its memory."""
        return self._slept

    def state(self) -> LearnerState:
        return state_with(0.0)

    def load_state(self, state: LearnerState, *weights: PolicyWeights) -> None:
        self._loaded = float(weights[-1].buffer[0])

    def lead(self, batch: TrainBatch) -> tuple[dict[str, float], PolicyWeights, LearnerState]:
        self._meet_fate()
        state = state_with(self._loaded + 1)
        return {"rank": float(self._rank)}, state.weights[-1], dataclasses.replace(state, weights=())

    def follow(self, batch: TrainBatch) -> tuple[str, dict[str, np.ndarray]]:
        self._meet_fate()
        astray = self._fate == "goes astray"
        return state_with(self._loaded + (2 if astray else 1)).trained.fingerprint, moments_of(self._rank)

    def _meet_fate(self) -> None:
        match self._fate:
            case "waits":
                time.sleep(FOR_EVER)
            case "has bad weights":
                raise WeightsDidNotArrive("sampled with other weights")
            case "follows":
                raise OtherRankFailed("another rank cannot go on")
            case "misses another":
                raise DistBackendError("NCCL communicator was aborted on rank 0.")
            case "lost a trajectory":
                raise ObjectLostError("an id", None, "")
            case "dies":
                ray.actor.exit_actor()


@pytest.fixture(scope="module")
def left() -> Iterator[list[list[Any]]]:
    """The pairs of ranks that are left of earlier tests: at most one."""
    pairs: list[list[Any]] = []
    yield pairs
    for actor in [actor for pair in pairs for actor in pair]:
        ray.kill(actor)


@pytest.fixture
def group_of(cluster: None, left: list[list[Any]]) -> Any:
    """A group of two ranks with these fates, and what it counts; those started in their place have none."""
    made: list[list[Any]] = []
    deaths: list[Death] = []
    fated: list[tuple[str, str]] = []

    def make(fates: tuple[str, str] = ("", "")) -> list[Any]:
        remote = ray.remote(num_cpus=0)(Rank)
        pair = left.pop() if left else [remote.remote(rank) for rank in range(2)]
        ray.get([actor.take_fate.remote(fate) for actor, fate in zip(pair, fates, strict=True)])
        fated.append(fates)
        made.append(pair)
        return pair

    def wait(references: tuple[Any, ...], loading: bool) -> None:
        assert ray.wait(list(references), num_returns=1, timeout=60)[0], "waits in vain"

    def group(*fates: str) -> tuple[RayLearnerGroup, list[list[Any]], list[Death]]:
        ranks = RayLearnerGroup(make((fates[0], fates[1])), make, wait, deaths.append, 0)
        ranks.wait_until_loaded()
        return ranks, made, deaths

    yield group
    lasts = not {"waits", "dies"} & set(fated[-1])
    for actor in [actor for generation in made[: -1 if lasts else None] for actor in generation]:
        ray.kill(actor)
    left += made[-1:] if lasts else []


Group = Callable[..., tuple[RayLearnerGroup, list[list[Any]], list[Death]]]


def test_the_driver_gets_rank_0s_state_with_the_optimizer_state_of_all_ranks(group_of: Group) -> None:
    group, made, deaths = group_of("", "")
    metrics, state = group.update(BATCH, [])
    assert metrics == {"rank": 0.0} and state.trained.buffer[0] == 1.0
    assert state.optimizer == {**moments_of(0), **moments_of(1)}, "the moments that others keep are part of it"
    assert len(made) == 1 and not deaths


@pytest.mark.parametrize("fates", [("waits", "dies"), ("dies", "waits"), ("misses another", "waits"), ("dies", "dies")])
def test_if_a_rank_dies_all_restart_from_the_last_state_and_one_death_counts(
    fates: tuple[str, str], group_of: Group
) -> None:
    group, made, deaths = group_of(*fates)
    group.load_state(state_with(4.0))
    _, state = group.update(BATCH, [])
    assert state.trained.buffer[0] == 5.0
    assert len(made) == 2 and len(deaths) == 1


def test_a_rank_that_rays_memory_monitor_ends_is_a_rank_that_died(
    group_of: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray raises the monitor's own error for the rank's calls, in place of RayActorError."""
    group, made, deaths = group_of("dies", "waits")
    group.load_state(state_with(4.0))
    get = ray.get

    def get_as_after_the_monitor(*arguments: Any, **options: Any) -> Any:
        try:
            return get(*arguments, **options)
        except RayActorError:
            raise OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.") from None

    monkeypatch.setattr(ray, "get", get_as_after_the_monitor)
    assert group.update(BATCH, [])[1].trained.buffer[0] == 5.0
    assert len(made) == 2 and len(deaths) == 1 and not deaths[0].by_driver


@pytest.mark.parametrize("fates", [("follows", "has bad weights"), ("has bad weights", "follows")])
def test_the_rank_that_knows_what_is_wrong_is_the_one_that_is_heard(fates: tuple[str, str], group_of: Group) -> None:
    group, made, deaths = group_of(*fates)
    with pytest.raises(WeightsDidNotArrive, match="sampled with other weights"):
        group.update(BATCH, [])
    assert len(made) == 1 and not deaths


def test_an_error_of_one_rank_is_not_waited_out_with_the_others(group_of: Group) -> None:
    group, _, _ = group_of("waits", "has bad weights")
    with pytest.raises(RayTaskError, match="sampled with other weights"):
        group.update(BATCH, [])


def test_trajectories_lost_by_one_rank_are_sampled_again_for_restarted_ranks(group_of: Group) -> None:
    group, made, deaths = group_of("waits", "lost a trajectory")
    with pytest.raises(TrajectoriesLost, match="round 3"):
        group.update(BATCH, [])
    assert len(made) == 2 and not deaths
    assert group.update(BATCH, [])[1].trained.buffer[0] == 1.0


class Recorder:
    """A turn that notes how often ranks have slept when it begins and when it ends."""

    def __init__(self, ranks: Callable[[], list[Any]]) -> None:
        self._ranks = ranks
        self.noted: list[list[int]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._note()
        try:
            yield
        finally:
            self._note()

    def _note(self) -> None:
        self.noted.append(ray.get([rank.slept.remote() for rank in self._ranks()]))


@pytest.mark.parametrize("fates", [("", ""), ("waits", "dies")])
def test_in_their_turn_all_ranks_update_and_then_sleep(fates: tuple[str, str], group_of: Group) -> None:
    group, made, _ = group_of(*fates)
    group.turn = recorder = Recorder(lambda: made[-1])
    group.update(BATCH, [])
    assert recorder.noted == [[0, 0], [1, 1]], "an update and its repetition after a death are one turn"
    group.update(BATCH, [])
    assert recorder.noted[2:] == [[1, 1], [2, 2]]


def test_ranks_sleep_before_lost_trajectories_are_sampled_again(group_of: Group) -> None:
    group, made, _ = group_of("waits", "lost a trajectory")
    group.turn = recorder = Recorder(lambda: made[-1])
    with pytest.raises(TrajectoriesLost):
        group.update(BATCH, [])
    assert recorder.noted == [[0, 0], [1, 1]]


def test_ranks_that_share_no_gpu_do_not_sleep(group_of: Group) -> None:
    group, made, _ = group_of("", "")
    group.update(BATCH, [])
    assert ray.get([rank.slept.remote() for rank in made[-1]]) == [0, 0]


def test_a_rank_that_arrives_at_other_weights_ends_the_run_by_its_name(group_of: Group) -> None:
    group, _, _ = group_of("", "goes astray")
    with pytest.raises(RuntimeError, match=r"after round 3 the weights of learner ranks \[1\] are not those of rank 0"):
        group.update(BATCH, [])

"""RayLearnerGroup: the learner on Ray actors, one a rank, restarted from the last completed round if a rank dies.

**Where the state is.** After each round a rank returns its state as objects in Ray's store: the new version's weights,
and optimizer state and the rest. The driver maps these objects into its memory (`ray.get` of numpy arrays makes no
copy) and reads no number of them except to write a checkpoint. So its heap does not grow with the network. Tasks
carry references to the weights' objects (`StoredWeights`). Samplers therefore read the object that the learner wrote,
and the driver does not store the weights again.

**Why the driver does not keep references alone.** An object outlives the actor that returned it, but not the actor's
node. With references alone the death of the learner's node would lose every round since the last checkpoint. So would
the loss of the cluster, after which the last round is committed from the mapped memory, and SIGTERM leaves no time to
fetch gigabytes. A mapped object has a copy on the driver's node, which cannot be evicted while it is mapped. So a round
counts as completed once its state has arrived there. If learner and driver share a node, nothing is copied. Otherwise
each round sends the new version and the optimizer state over the network once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from jaxtyping import Float
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.machine import Machine
from ray_ddpo.common.policy_versions import kept_versions
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.process_deaths import LOADING, PROCESS_ENDED, Death
from ray_ddpo.common.role_loading import RoleNotStarted
from ray_ddpo.common.stored_weights import reference_to, stored_at
from ray_ddpo.common.trajectory import Rollout, Scored, TrainBatch
from ray_ddpo.learner.call_names import title_of
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.learner_group import Learned, LearnerGroup, TrajectoriesLost, Wait
from ray_ddpo.learner.process_group import OtherRankFailed, Rendezvous, is_lost_rank

STACKS_SECONDS = 5.0


class RayLearnerGroup(LearnerGroup):
    """The learner's ranks, one or several, each on a Ray actor. Trajectories go to them by reference.

    After each update the driver gets rank 0's state and the optimizer state of the other ranks, as views of Ray's
    store. If a rank dies, all ranks are restarted from the last completed round, because the others deadlock in the
    next collective.
    """

    def __init__(
        self,
        actors: list[Any],
        make: Callable[[], list[Any]],
        wait: Wait,
        on_death: Callable[[Death], None],
        max_policy_lag: int,
        shards_weights: bool = False,
    ) -> None:
        """Take over the ranks' actors.

        Args:
            actors: rank 0 first.
            make: starts new actors in their place.
            wait: blocks until one of some references is ready.
            on_death: reports and counts a death, and may refuse a restart by raising.
            max_policy_lag: most rounds that a version is behind which is kept, the recipe's `kept_lag`.
            shards_weights: full weights must be gathered from all ranks.
        """
        self._actors = actors
        self._ended = 0  # number of actors before the current ones
        self._at = LOADING
        self._make = make
        self._wait = wait
        self._on_death = on_death
        self._max_policy_lag = max_policy_lag
        self._shards_weights = shards_weights
        # A callback that compares the ranks' loaded files, given the rank's name and their fingerprints. May raise.
        self.on_loaded: Callable[[str, Base], None] = lambda who, loaded: None
        # The learner's turn on GPUs that ranks share with samplers. None: ranks share none.
        self.turn: Callable[[], AbstractContextManager[None]] | None = None
        self._rendezvous: Rendezvous | None = None  # must outlive the ranks
        self._state: LearnerState | None = None  # after the last completed round, with StoredWeights
        self._begun: list[Scored] = []  # parts of the current round
        self._beginning: list[Any] = []  # references to their results

    def wait_until_loaded(self) -> None:
        """Wait until all actors are loaded and have joined their process group.

        Raises:
            RoleNotStarted: the constructor of an actor raised an error.
        """
        self._load_and_join()
        self._state = _with_stored_weights(self._call("state", on_all_ranks=self._shards_weights))

    def _load_and_join(self) -> None:
        """Wait until the ranks are loaded, compare what they loaded, and let them join at a rendezvous."""
        self._at = LOADING
        try:
            for rank, loaded in enumerate(self._answers([each.ready.remote() for each in self._actors], loading=True)):
                self.on_loaded(f"learner rank {rank}" if len(self._actors) > 1 else "learner", loaded)
            if len(self._actors) > 1:
                self._rendezvous = Rendezvous(ray.util.get_node_ip_address())
                self._answers([actor.join.remote(self._rendezvous.address) for actor in self._actors], loading=True)
        except RayError as error:
            self._restart(error)
        self._at = "between two rounds"

    def _answers(self, references: list[Any], loading: bool = False) -> list[Any]:
        """Wait for these calls and return their results.

        The first error is raised at once, because another rank may wait for the failed one in a collective.
        """
        left, found, follows = references, {}, None
        while left:
            self._wait(tuple(left), loading)
            done, left = ray.wait(left, num_returns=len(left), timeout=0, fetch_local=False)
            for reference in done:
                try:
                    found[reference] = ray.get(reference)
                except RayTaskError as error:
                    if not isinstance(
                        error.cause, OtherRankFailed
                    ):  # the other rank raises the cause, so keep waiting for it
                        raise
                    follows = error
                if isinstance(found.get(reference), RoleNotStarted):  # a new actor would fail alike
                    raise found[reference]
        if follows:
            raise follows
        return [found[reference] for reference in references]

    def _call(self, method: str, *arguments: Any, on_all_ranks: bool = False) -> Any:
        """Call a method on rank 0, or on all ranks, and return rank 0's result."""
        return self._call_all(method, *arguments, count=None if on_all_ranks else 1)[0]

    def _call_all(self, method: str, *arguments: Any, count: int | None = None) -> list[Any]:
        """Call a method on the first `count` ranks, or on all. If a rank dies, restart all and call again."""
        while True:
            try:
                calls = [getattr(actor, method).remote(*arguments) for actor in self._actors[:count]]
                return self._answers(calls, loading=True)
            except RayError as error:
                self._restart(error)

    def _restart(self, error: RayError) -> None:
        """Restart all ranks if `error` means that a rank died; otherwise raise the error."""
        # Another rank may notice a lost one before Ray reports it.
        missed = isinstance(error, RayTaskError) and is_lost_rank(error.cause)
        # If Ray could not make the actor, a new one would fail alike.
        died = isinstance(error, PROCESS_ENDED) and not getattr(error, "actor_init_failed", False)
        if not (missed or died or isinstance(error, ObjectLostError)):
            raise error
        ids = [actor._actor_id.hex() for actor in self._actors]
        dead = ids.index(error.actor_id) if isinstance(error, RayActorError) and error.actor_id in ids else None
        self._on_death(Death(None if dead is None else self._ended + dead, str(error), self._at))
        self._start_again()

    def _start_again(self) -> None:
        self.close()
        self._ended += len(self._actors)
        self._actors = self._make()
        self._load_and_join()
        if self._state is not None:
            self.restore_last_round()

    def begin(self, batch: TrainBatch, rollouts: list[Rollout]) -> None:
        self._begun.append((batch, rollouts))
        trajectories = [rollout.trajectory for rollout in rollouts]
        for rank, actor in enumerate(self._actors):
            begin = actor.begin.options(name=title_of(batch, rank, len(self._actors)))
            self._beginning.append(begin.remote(batch, *trajectories))

    def update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Learned:
        if self.turn is None:
            return self._learn(batch, rollouts)
        with self.turn():
            try:
                learned = self._learn(batch, rollouts)
            except TrajectoriesLost:
                self._call("sleep", on_all_ranks=True)
                raise
            self._call("sleep", on_all_ranks=True)
            return learned

    def _learn(self, batch: TrainBatch, rollouts: list[Rollout]) -> Learned:
        """Train on a round. If a rank dies, restart all ranks and train again."""
        while True:
            try:
                learned = self._update(batch, [rollout.trajectory for rollout in rollouts])
            except RayTaskError as error:  # before the next clause, since Ray derives it from its cause's class too
                if not isinstance(error.cause, ObjectLostError):
                    self._begin_again(error)
                    continue
                self._undo()
                raise TrajectoriesLost(f"round {batch.round}: {error.cause}") from error
            except (*PROCESS_ENDED, ObjectLostError) as error:  # the actor died, or its node was lost with the state
                self._begin_again(error)
            else:
                self._state, self._at = learned[1], "between two rounds"
                self._begun, self._beginning = [], []
                return learned

    def _update(self, batch: TrainBatch, trajectories: list[Any]) -> Learned:
        """Make one attempt at an update.

        Raises:
            RuntimeError: ranks have different weights after the update.
        """
        first, *others = self._actors
        count, self._at = len(self._actors), f"at round {batch.round}"
        lead = first.lead.options(num_returns=3, name=title_of(batch, 0, count))
        metrics, weights, state = lead.remote(batch, *trajectories)
        followed = [
            actor.follow.options(num_returns=2, name=title_of(batch, rank, count)).remote(batch, *trajectories)
            for rank, actor in enumerate(others, start=1)
        ]
        self._answers(self._beginning)  # first, because a rank refuses a part after one that failed
        found, *fingerprints = self._answers([metrics, *(fingerprint for fingerprint, _ in followed)])
        assert self._state is not None, "the ranks are loaded"
        published = kept_versions((*self._state.weights, stored_at(weights)), self._max_policy_lag)
        of_rank_0: LearnerState = ray.get(state)
        learned = replace(of_rank_0, weights=published)
        if not followed:
            return found, learned
        complete = learned.with_optimizer_state(ray.get([shard for _, shard in followed]))
        own = complete.trained.fingerprint
        differing = [rank for rank, fingerprint in enumerate(fingerprints, start=1) if fingerprint != own]
        if differing:
            raise RuntimeError(
                f"after round {batch.round} the weights of learner ranks {differing} are not those of rank 0"
            )
        return found, complete

    def _begin_again(self, error: RayError) -> None:
        begun, self._begun, self._beginning = self._begun, [], []
        self._restart(error)
        for part in begun:
            self.begin(*part)

    def _undo(self) -> None:
        """Go back to the last completed round."""
        begun, self._begun, self._beginning = self._begun, [], []
        if len(self._actors) > 1:  # ranks that have their trajectories wait for the one that has not
            self._start_again()
        elif begun:
            self.restore_last_round()

    def weights(self) -> tuple[PolicyWeights, ...]:
        assert self._state is not None, "the ranks are loaded"
        return self._state.weights

    def log_ratios(self) -> Float[np.ndarray, "N"]:
        return self._call("log_ratios")

    def load_state(self, state: LearnerState) -> None:
        self._state = _with_stored_weights(state)
        self.restore_last_round()

    def restore_last_round(self) -> None:
        assert self._state is not None, "the ranks are loaded"
        weights = map(reference_to, self._state.weights)
        self._call("load_state", ray.put(replace(self._state, weights=())), *weights, on_all_ranks=True)

    def check_folder(self, folder: str, token: str) -> None:
        self._call("check_folder", folder, token)

    def save_policy(self, folder: str, weights: PolicyWeights | None = None) -> str:
        if self._shards_weights and weights is None:  # no rank has the full weights
            assert self._state is not None, "the ranks are loaded"
            weights = self._state.trained
        return self._call("save_policy", folder, weights and reference_to(weights))

    def machine(self) -> Machine | None:
        return self._state.machine if self._state else None

    def stacks(self) -> str:
        asked = [actor.stacks.options(concurrency_group="health").remote() for actor in self._actors]
        if len(asked) == 1:
            return _stack(asked[0])
        return "\n".join(f"--- rank {rank}\n{_stack(reference)}" for rank, reference in enumerate(asked))

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


def _with_stored_weights(state: LearnerState) -> LearnerState:
    """Put the weights of a state into Ray's store, each version once."""
    return replace(state, weights=tuple(stored_at(reference_to(weights)) for weights in state.weights))


def _stack(reference: Any) -> str:
    try:
        return ray.get(reference, timeout=STACKS_SECONDS)
    except GetTimeoutError:
        return f"it does not answer within {STACKS_SECONDS:g} s"
    except RayError as error:
        return f"it cannot be asked: {error}"

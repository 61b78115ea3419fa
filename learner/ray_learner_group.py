"""RayLearnerGroup: the learner on Ray actors, one a rank, started again from the last whole round if one of them dies."""

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from jaxtyping import Float
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.machine import Machine
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.process_deaths import LOADING, Death
from ray_ddpo.common.role_loading import RoleNotStarted
from ray_ddpo.common.trajectory import Rollout, Scored, TrainBatch
from ray_ddpo.learner.call_names import title_of
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.learner_group import Learned, LearnerGroup, TrajectoriesLost, Wait
from ray_ddpo.learner.process_group import OtherRankFailed, Rendezvous, is_lost_rank

STACKS_SECONDS = 5.0


class RayLearnerGroup(LearnerGroup):
    """The learner's ranks, one or several, each on a Ray actor; trajectories go to them by reference, straight from their nodes.

    After each update the driver takes rank 0's state over, and the moments that others keep, so where a rank dies all are started
    again from the last whole round: the others would wait for it in their next collective.
    """

    def __init__(
        self, actors: list[Any], make: Callable[[], list[Any]], wait: Wait, on_death: Callable[[Death], None]
    ) -> None:
        """The ranks' actors, rank 0 first. `make` starts others in their place, `wait` waits until one of some references is
        there, `on_death` tells of deaths, counts them and may refuse another start."""
        self._actors = actors
        self._ended = 0  # actors before these
        self._at = LOADING
        self._make = make
        self._wait = wait
        self._on_death = on_death
        # Set by who compares what the ranks have loaded: told which rank and what; it may raise an error.
        self.on_loaded: Callable[[str, Base], None] = lambda who, loaded: None
        self._rendezvous: Rendezvous | None = None  # has to outlive the ranks
        self._state: LearnerState | None = None  # after the last whole round
        self._begun: list[Scored] = []  # parts of the present round
        self._beginning: list[Any] = []  # references to what comes of them

    def wait_until_loaded(self) -> None:
        """Wait for the actors, and until they have met. RoleNotStarted: the constructor of one raised an error."""
        self._meet()
        self._state = self._call("state")

    def _meet(self) -> None:
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
        """What these lead to. The first that fails ends it: what another rank waits for may never come."""
        left, found, follows = references, {}, None
        while left:
            self._wait(tuple(left), loading)
            done, left = ray.wait(left, num_returns=len(left), timeout=0, fetch_local=False)
            for reference in done:
                try:
                    found[reference] = ray.get(reference)
                except RayTaskError as error:
                    if not isinstance(error.cause, OtherRankFailed):  # the other one says why, and is heard too
                        raise
                    follows = error
                if isinstance(found.get(reference), RoleNotStarted):  # another one would not start either
                    raise found[reference]
        if follows:
            raise follows
        return [found[reference] for reference in references]

    def _call(self, method: str, *arguments: Any, everywhere: bool = False) -> Any:
        """One call on rank 0, or on all; rank 0's answer."""
        return self._call_all(method, *arguments, count=None if everywhere else 1)[0]

    def _call_all(self, method: str, *arguments: Any, count: int | None = None) -> list[Any]:
        """One call on each of the first ranks, or on all; on new actors from the last state where one dies."""
        while True:
            try:
                calls = [getattr(actor, method).remote(*arguments) for actor in self._actors[:count]]
                return self._answers(calls, loading=True)
            except RayError as error:
                self._restart(error)

    def _restart(self, error: RayError) -> None:
        """Others in the place of all ranks, if `error` is that one of them has died; else it is raised."""
        missed = isinstance(error, RayTaskError) and is_lost_rank(error.cause)  # by another rank, before Ray tells
        died = isinstance(error, RayActorError) and not error.actor_init_failed  # the same would happen to the next one
        if not (missed or died or isinstance(error, ObjectLostError)):
            raise error
        ids = [actor._actor_id.hex() for actor in self._actors]
        dead = ids.index(error.actor_id) if isinstance(error, RayActorError) and error.actor_id in ids else None
        self._on_death(Death(None if dead is None else self._ended + dead, str(error), self._at))
        self._start_anew()

    def _start_anew(self) -> None:
        self.close()
        self._ended += len(self._actors)
        self._actors = self._make()
        self._meet()
        if self._state is not None:
            self._call("load_state", ray.put(self._state), everywhere=True)

    def begin(self, batch: TrainBatch, rollouts: list[Rollout]) -> None:
        self._begun.append((batch, rollouts))
        trajectories = [rollout.trajectory for rollout in rollouts]
        for rank, actor in enumerate(self._actors):
            begin = actor.begin.options(name=title_of(batch, rank, len(self._actors)))
            self._beginning.append(begin.remote(batch, *trajectories))

    def update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Learned:
        while True:
            try:
                learned = self._update(batch, [rollout.trajectory for rollout in rollouts])
            except RayTaskError as error:  # first: Ray makes it an error of its cause's class too
                if not isinstance(error.cause, ObjectLostError):
                    self._begin_again(error)
                    continue
                self._undo()
                raise TrajectoriesLost(f"round {batch.round}: {error.cause}") from error
            except (RayActorError, ObjectLostError) as error:  # it died, or its node went with the state
                self._begin_again(error)
            else:
                self._state, self._at = learned[1], "between two rounds"
                self._begun, self._beginning = [], []
                return learned

    def _update(self, batch: TrainBatch, trajectories: list[Any]) -> Learned:
        """One attempt. RuntimeError: ranks have arrived at different weights."""
        first, *others = self._actors
        count, self._at = len(self._actors), f"at round {batch.round}"
        update = first.update.options(num_returns=2, name=title_of(batch, 0, count))
        metrics, state = update.remote(batch, *trajectories)
        followed = [
            actor.follow.options(num_returns=2, name=title_of(batch, rank, count)).remote(batch, *trajectories)
            for rank, actor in enumerate(others, start=1)
        ]
        self._answers(self._beginning)  # first: after a part that failed, the next is refused
        found, *fingerprints = self._answers([metrics, *(fingerprint for fingerprint, _ in followed)])
        learned: LearnerState = ray.get(state)
        if not followed:
            return found, learned
        whole = learned.with_optimizer_state(ray.get([moments for _, moments in followed]))
        own = whole.trained.fingerprint
        differing = [rank for rank, fingerprint in enumerate(fingerprints, start=1) if fingerprint != own]
        if differing:
            raise RuntimeError(
                f"after round {batch.round} the weights of learner ranks {differing} are not those of rank 0"
            )
        return found, whole

    def _begin_again(self, error: RayError) -> None:
        begun, self._begun, self._beginning = self._begun, [], []
        self._restart(error)
        for part in begun:
            self.begin(*part)

    def _undo(self) -> None:
        """Back to the last whole round."""
        begun, self._begun, self._beginning = self._begun, [], []
        if len(self._actors) > 1:  # those that had their trajectories wait for the one that had not
            self._start_anew()
        elif begun:
            self._call("load_state", self._state)

    def weights(self) -> tuple[PolicyWeights, ...]:
        return self._call("weights")

    def log_ratios(self) -> Float[np.ndarray, "N"]:
        return self._call("log_ratios")

    def load_state(self, state: LearnerState) -> None:
        self._state = state
        self._call("load_state", ray.put(state), everywhere=True)

    def check_folder(self, folder: str, token: str) -> None:
        self._call("check_folder", folder, token)

    def save_policy(self, folder: str, weights: PolicyWeights | None = None) -> str:
        return self._call("save_policy", folder, weights)

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


def _stack(reference: Any) -> str:
    try:
        return ray.get(reference, timeout=STACKS_SECONDS)
    except GetTimeoutError:
        return f"it does not answer within {STACKS_SECONDS:g} s"
    except RayError as error:
        return f"it cannot be asked: {error}"

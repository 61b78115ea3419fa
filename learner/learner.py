"""Learner: owns policy and optimizer, and turns a round's trajectories and advantages into new weights and metrics."""

import functools
import time
from dataclasses import replace

import numpy as np
import torch

from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.diffusion.execution import set_up_execution
from ray_ddpo.common.diffusion.host_loading import network_on_host
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.diffusion.policy_trial import load_checked
from ray_ddpo.common.machine import measured_machine
from ray_ddpo.common.policy_versions import kept_versions
from ray_ddpo.common.policy_weights import PolicyWeights, weights_of
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage, local_folder
from ray_ddpo.common.runtime import python_stacks, settle
from ray_ddpo.common.trajectory import TrainBatch, Trajectory, TransitionBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.companions import Companions
from ray_ddpo.learner.drift import divergence, kl_subset, needs_reference_kl, reference_kl
from ray_ddpo.learner.held_weights import ShardedWeights, WeightsHolder, WholeWeights
from ray_ddpo.learner.learning_trial import try_learning
from ray_ddpo.learner.optimization.checkpointing import fit_micro_batches, loadable, use_checkpointing
from ray_ddpo.learner.optimization.compile_learning import compile_learning
from ray_ddpo.learner.optimization.gradients import Gradients, ShardedGradients, gradient_scaler
from ray_ddpo.learner.optimization.learning_rate import learning_rate
from ray_ddpo.learner.optimization.optimizer import load_optimizer_arrays, optimizer_arrays
from ray_ddpo.learner.optimization.optimizer_steps import OptimizerSteps, refuse_weights
from ray_ddpo.learner.optimization.sharded_optimizer import rank_optimizer
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.round_data.epochs import steps_of_epochs
from ray_ddpo.learner.round_data.reference_passes import Update
from ray_ddpo.learner.round_data.step_batches import StepBatches
from ray_ddpo.learner.round_data.transitions import Indices, RoundTransitions, round_transitions
from ray_ddpo.learner.round_items import RoundItems, executed_config
from ray_ddpo.learner.sharding.layout import shards_weights
from ray_ddpo.learner.sharding.sharded_loading import shard_loaded
from ray_ddpo.learner.sharding.sharded_network import local_shards
from ray_ddpo.learner.temporary_weights import HeldWeights, load_held
from ray_ddpo.learner.update_metrics import Divergence, UpdateMetrics
from ray_ddpo.learner.weight_check import Arrival, ArrivalCheck, refuse_mismatch, refuse_unnumbered


class Learner:
    """The learner in one process on one device.

    `update` is a pure function of its state, the batch and the trajectories. With several ranks, each rank is such a
    process and trains on its share of every optimizer step. All ranks must get the same calls in the same order.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        algorithm: Algorithm,
        recipe: Recipe,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Load the policy and make the optimizer.

        Args:
            process_group: this rank among several, which must `join` the others. None: this is the only rank.
        """
        self._process_group = process_group or ProcessGroup()
        rank = f" {self._process_group}," if self._process_group.world_size > 1 else ""
        self._called = f"Learner{rank} of {policy.model} by {recipe.algorithm.name}"
        self._device = settle(recipe.runtime)
        self._called += f" on {self._device}"
        self._recipe = recipe
        self._machine = measured_machine(self._device, policy.dtype_of("learner"))
        self._settings = recipe.learner
        self._algorithm = algorithm
        self._steps_per_round = algorithm.steps_per_round(recipe)
        self._shards_weights = shards_weights(self._settings)
        # The ranks that share a KL estimate: if weights are sharded, all pass the same, since all take part in a pass.
        self._kl_group = ProcessGroup() if self._shards_weights else self._process_group
        with torch.random.fork_rng(devices=[]), network_on_host(self._shards_weights) as self._loading:
            torch.manual_seed(recipe.seed)  # decides the adapters' initial values
            self._policy = load_checked(loadable(policy), self._device, recipe.sampling, "learner")
        self._base = policy.loaded_base("learner") | algorithm.load(self._policy, policy)
        self._try = functools.partial(try_learning, self._policy, policy, algorithm, recipe)
        self._is_tried = self._loading.placed(self._policy.network, self._device)
        if self._is_tried:  # otherwise `join` reads its weights, or moves them to the device
            self._try()
        algorithm.check_micro_batches(recipe, len(self._policy.stochastic_steps))  # known only from the loaded model
        self._micro_batch_size, self._recomputes = fit_micro_batches(self._policy, policy, algorithm, recipe)
        self._compiles, self._config = policy.is_compiled("learner"), executed_config(policy, algorithm)
        self._set_up_execution()
        compile_learning(policy, self._policy, algorithm, recipe, self._micro_batch_size)
        self._companions = Companions(algorithm, self._policy, recipe, self._process_group)
        self._items = RoundItems(self._policy, policy, algorithm, recipe, self._process_group)
        self._arrival_check = ArrivalCheck(policy, recipe, self._policy)
        self._metrics, self._version = self._no_metrics(), 0  # of the current round; rounds trained on
        self._log_ratios: torch.Tensor | None = None  # of the previous round
        self._scaler = gradient_scaler(
            self._device, policy.dtype, self._process_group if self._shards_weights else None
        )
        if not self._shards_weights:  # otherwise `join` makes them, since only the group can shard
            self._weights: WeightsHolder = WholeWeights(self._policy)
            self._parameters = trained_parameters(self._policy.network)
            self._start_training(None)

    def _shard_network(self) -> None:
        """Shard the network over the ranks that have joined, and make the optimizer of this rank's shards."""
        network, group = self._policy.network, self._process_group
        self._weights = ShardedWeights(self._policy, group)
        shard_loaded(network, group, self._settings.offload_weights, self._loading.unread)
        self._parameters = local_shards(network)
        self._start_training(ShardedGradients(network, self._parameters, group))
        if not self._is_tried:
            self._try()

    def _start_training(self, gradients: Gradients | None) -> None:
        """Make the optimizer of `self._parameters`, and publish the first version."""
        self._optimizer, self._owned = rank_optimizer(self._parameters, self._settings, self._process_group)
        steps = (self._optimizer, self._scaler, self._parameters, self._process_group, self._settings, self._device)
        self._steps = OptimizerSteps(*steps, gradients)
        self._trained: HeldWeights = self._weights.read(0)  # at the start of the round
        self._published: tuple[HeldWeights, ...] = (self._trained,)

    def __repr__(self) -> str:
        """Return the name on the dashboard's page of actors, beside run, role and number."""
        return self._called

    def _no_metrics(self) -> UpdateMetrics:
        return UpdateMetrics(self._policy.num_steps, int(np.prod(self._policy.latent_shape)))

    def join(self, rendezvous: str) -> None:
        """Join the other ranks.

        Raises:
            RuntimeError: the ranks do not start with the same weights.
        """
        self._process_group.join(rendezvous, self._device)
        self._use_micro_batch_size(int(self._process_group.all_reduce_min(self._micro_batch_size)))
        self._use_checkpointing(self._process_group.all_reduce_max(self._recomputes) > 0)
        if self._shards_weights:
            with self._process_group.passes():
                self._shard_network()
        else:
            self._process_group.check_equal(self._parameters.values())

    def ready(self) -> Base:
        """Return the fingerprints of the loaded files. The call returns when everything is loaded."""
        return self.loaded_parts()

    def stacks(self) -> str:
        """Return the stacks of this process's threads. Answered from a separate thread during an update."""
        return python_stacks()

    def sleep(self) -> None:
        """Return the memory of activations to the GPU, which is the samplers' next. An update wakes this rank.

        Weights, optimizer state and the last gradients stay.
        """
        self._policy.sleep()

    def loaded_parts(self) -> Base:
        """Return the fingerprints of the files that policy and algorithm were loaded from."""
        return self._base

    def weights(self) -> tuple[PolicyWeights, ...]:
        """Return the versions that rounds may still be sampled with, the newest last. A collective if sharded."""
        whole = (self._weights.whole(each) for each in self._published)
        return tuple(each for each in whole if each is not None)

    def update(self, batch: TrainBatch, *trajectories: Trajectory) -> tuple[dict[str, float], LearnerState]:
        """Train on a round, or on its last part.

        Returns:
            The round's metrics, and the state after the round with the next version's weights.

        Raises:
            RuntimeError: a trajectory was not sampled with the weights of its version, by its report or by its
                log-probs (WeightsDidNotArrive). The learner is then in the same state as before this call.
        """
        return self._learn_last_part(batch, trajectories), self.state()

    def lead(
        self, batch: TrainBatch, *trajectories: Trajectory
    ) -> tuple[dict[str, float], PolicyWeights, LearnerState]:
        """Train on a round, or on its last part, on rank 0 on Ray, like `update`.

        Returns:
            The round's metrics, the new version's weights, and the rest of the state without published weights. Each is
            an object of its own in Ray's store: samplers read the weights alone, and earlier versions are not sent again.
        """
        metrics = self._learn_last_part(batch, trajectories)
        state = self.state(newest_only=True)
        return metrics, state.weights[-1], replace(state, weights=())

    def follow(self, batch: TrainBatch, *trajectories: Trajectory) -> tuple[str, dict[str, np.ndarray]]:
        """Train on a round, or on its last part, on a rank other than 0, whose metrics are not needed.

        Returns:
            The fingerprint of the trained weights, and the optimizer state that only this rank has.
        """
        self._learn_last_part(batch, trajectories)
        if self._shards_weights:
            return self._trained.fingerprint, self.state(newest_only=True).optimizer  # takes part in gathering weights
        own = optimizer_arrays(self._optimizer, self._owned) if self._owned is not self._parameters else {}
        return self._trained.fingerprint, own

    def _learn_last_part(self, batch: TrainBatch, trajectories: tuple[Trajectory, ...]) -> dict[str, float]:
        """Train on the last part of a round, publish the next version, and return the round's metrics."""
        assert batch.part == batch.parts - 1, f"part {batch.part} of {batch.parts} is not the round's last"
        with self._process_group.passes():
            self._learn_from(batch, trajectories)
        trained = self._weights.read(self._version + 1)
        with self._process_group.raise_on_all_ranks():  # each rank sees only its own shards
            refuse_weights(trained, batch.round, self._settings)
        self._version, self._trained = self._version + 1, trained
        decay = self._algorithm.ema_decay(self._version)
        published = trained if decay is None else self._weights.averaged(self._published[-1], trained, decay)
        self._published = kept_versions((*self._published, published), self._recipe.kept_lag)
        metrics, self._metrics = self._metrics, self._no_metrics()
        metrics.gather(self._process_group)
        self._log_ratios = metrics.log_ratios()
        summary = self._companions.end_round(metrics.summary(), trained)
        return {**summary, "learner/micro_batch_size": float(self._micro_batch_size)}

    def log_ratios(self) -> np.ndarray:
        """Return log_prob − old_log_prob of the last round's transitions; empty before the first round."""
        return np.empty(0) if self._log_ratios is None else self._log_ratios.double().cpu().numpy()

    def begin(self, batch: TrainBatch, *trajectories: Trajectory) -> None:
        """Train on a part of a round that is not its last, and publish nothing. Raises the same errors as `update`."""
        assert batch.part < batch.parts - 1, f"part {batch.part} of {batch.parts} is the round's last"
        with self._process_group.passes():
            self._learn_from(batch, trajectories)

    def _learn_from(self, batch: TrainBatch, trajectories: tuple[Trajectory, ...]) -> None:
        """Check the weights of a part's trajectories, then make the part's optimizer steps."""
        start = time.perf_counter()
        assert batch.part == self._metrics.parts_done, f"part {self._metrics.parts_done} of round {batch.round} is next"
        for report in batch.reports:
            refuse_mismatch(report, self._published, len(self._parameters))
        transitions = round_transitions(trajectories, batch.advantages, self._device, batch.kl_weights)
        present = self._trained if batch.part == 0 else self._weights.read(self._version)
        arrival = self._check_arrival(batch, transitions, present)
        transitions = self._companions.with_baselines(batch, transitions)
        weights = (self._sampled_with(batch), present)
        items = self._items.make(batch, transitions, weights, self._metrics)
        epochs = steps_of_epochs(self._recipe, self._algorithm, batch, items)
        ranks = (self._process_group, self._compiles, self._companions.reference, self._shards_weights)
        update = Update(items, epochs, *weights, *ranks)
        batches = StepBatches(self._algorithm, self._policy, update, self._micro_batch_size)
        for steps in epochs:
            for step in steps:
                self._optimizer_step(batches, step, batch)
            if self._kl_budget_spent(transitions, steps):
                break
        self._steps.check(batch, self._metrics.optimizer_steps)
        if batch.part == batch.parts - 1:
            self._metrics.set_divergence(self._divergence(transitions, steps))
            if needs_reference_kl(self._recipe, self._version + 1):
                some = kl_subset(transitions, steps, self._micro_batch_size, self._kl_group)
                self._metrics.set_reference_kl(reference_kl(self._policy, some, self._kl_group, self._compiles))
        self._metrics.end_part(time.perf_counter() - start, arrival)

    def _kl_budget_spent(self, transitions: RoundTransitions, steps: list[Indices]) -> bool:
        """Return whether the KL to the behavior policy is above `learner.max_kl_nats`, so that inner epochs end."""
        budget = self._settings.max_kl_nats
        if budget is None:
            return False
        over = self._metrics.kl_nats(self._divergence(transitions, steps)) > budget
        # All ranks stop or none, even if their machines round differently.
        return self._process_group.all_reduce_max(over) > 0

    def _check_arrival(self, batch: TrainBatch, transitions: RoundTransitions, present: HeldWeights) -> Arrival:
        """Check that the samplers had the weights of the round's version.

        Every round is checked, so that a resumed run needs no memory of earlier checks. Every rank checks the same
        transitions, and with them its own numerics.
        """
        if self._shards_weights:
            with self._process_group.raise_on_all_ranks():  # before any pass that others would wait in
                refuse_unnumbered(batch, transitions)
        with self._process_group.raise_on_all_ranks():
            found = self._arrival_check.check(batch, transitions, self._sampled_with(batch), present, self._machine)
        rounding = None if found.rounding is None else self._process_group.all_reduce_max(found.rounding)
        return Arrival(self._process_group.all_reduce_max(found.largest), rounding)

    def _sampled_with(self, batch: TrainBatch) -> HeldWeights:
        # The schedule gives a round a single version. Replayed rounds may have others.
        (version,) = {report.task.policy_version for report in batch.reports if report.task.round == batch.round}
        return weights_of(self._published, version)

    def _optimizer_step(self, batches: StepBatches, indices: Indices, batch: TrainBatch) -> None:
        """Accumulate the gradients of this rank's micro-batches, and apply the step."""
        # By the step's planned number: a round that a KL budget ended early leaves its other steps out. If more images
        # are learned from than was planned, a round's last rate is repeated, so that no number comes twice in turn.
        planned = self._steps_per_round
        number = batch.round * planned + min(self._metrics.optimizer_steps, planned - 1)
        rate = learning_rate(self._settings, number)
        self._metrics.set_learning_rate(rate)
        self._steps.begin(rate)
        passed, num_own = self._process_group.share_of_step(indices, even=self._shards_weights)
        for known, rows in batches.of_step(indices, passed, num_own):
            result = self._algorithm.compute_loss(self._policy, known).first(rows)
            self._steps.add(result, len(indices))
            if rows:  # the others are passed for other ranks' sake
                known_steps = known.steps[:rows] if isinstance(known, TransitionBatch) else None
                self._metrics.add_micro_batch(result, known_steps)
        may_be_zero = self._algorithm.gradient_may_be_zero(batch.advantages[indices[:, 0].numpy()])
        norm = self._steps.apply(len(indices), num_own, may_be_zero)
        if norm is None:
            self._metrics.skip_optimizer_step()
        else:
            self._metrics.end_optimizer_step(norm)

    def _divergence(self, transitions: RoundTransitions, steps: list[Indices]) -> Divergence:
        some = kl_subset(transitions, steps, self._micro_batch_size, self._kl_group)
        return divergence(self._policy, some, self._kl_group, self._compiles)

    def state(self, newest_only: bool = False) -> LearnerState:
        """Return a copy of all state. If optimizer state is sharded, the copy has this rank's shard only.

        A collective if weights are sharded: rank 0's copy then has the full weights, and that of others none.

        Args:
            newest_only: leave out the published versions but the newest.
        """
        first = self._process_group.rank == 0
        versions = self._published[-1:] if newest_only else self._published
        published = tuple(whole for each in versions if (whole := self._weights.whole(each, first)) is not None)
        same = self._trained.fingerprint == self._published[-1].fingerprint
        own = None if same else self._weights.whole(self._trained, first)
        optimizer = optimizer_arrays(self._optimizer, self._owned)
        state = (self._version, published, optimizer, self._scaler.state_dict(), own)
        found = LearnerState(*state, self._micro_batch_size, self._machine, self._recomputes)
        return self._companions.state(found, self._weights, first)

    def load_state(self, state: LearnerState, *weights: PolicyWeights) -> None:
        """Resume from `state`, and discard the parts of a round that were begun.

        Args:
            weights: the published versions, if they are not in `state`.

        Raises:
            ValueError: the state belongs to another network.
        """
        state = replace(state, weights=weights or state.weights)
        published = tuple(self._weights.held(each) for each in state.weights)
        trained = published[-1] if state.own_weights is None else self._weights.held(state.own_weights)
        load_held(self._policy.network, trained)
        load_optimizer_arrays(self._optimizer, self._owned, state.optimizer)
        self._companions.load(state, self._weights)
        self._metrics, self._log_ratios = self._no_metrics(), None
        self._steps.forget()
        if state.scaler:
            self._scaler.load_state_dict(state.scaler)
        self._version, self._published, self._trained = state.policy_version, published, trained
        # A size that was found by trial must stay: another size gives other last bits.
        if self._settings.micro_batch_size == "auto" and state.micro_batch_size is not None:
            self._use_micro_batch_size(state.micro_batch_size)
        if self._config.gradient_checkpointing == "auto" and state.recomputes is not None:
            self._use_checkpointing(state.recomputes)

    def _use_micro_batch_size(self, size: int) -> None:
        changes, self._micro_batch_size = size != self._micro_batch_size, size
        if changes and self._compiles:
            self._policy.compile(size)

    def _use_checkpointing(self, on: bool) -> None:
        changes, self._recomputes = on != self._recomputes, on
        if changes:
            use_checkpointing(self._policy.network, on)
            self._policy.graphed = None  # re-computation cannot be recorded
            self._set_up_execution()

    def _set_up_execution(self) -> None:
        if not self._shards_weights:  # a CUDA graph would not gather weights
            set_up_execution(self._config, self._policy, "learner", self._micro_batch_size)

    def check_folder(self, location: str, token: str) -> None:
        """Check that the run's folder is the same as on the driver's machine.

        Raises:
            ValueError: the folder is another one on this machine, so that the trained weights would be lost.
        """
        RunFolder(location).check_token(token, "the learner's machine")

    def save_policy(self, location: str, weights: PolicyWeights | None = None) -> str:
        """Write the trained weights, or `weights`, for diffusers into a run's folder, and return their location.

        Args:
            weights: needed if weights are sharded.
        """
        storage = Storage(location)
        with local_folder(storage) as folder, self._weights.saving(weights, self._trained):
            written = self._policy.save(folder).relative_to(folder)
        return storage.folder(str(written)).location

"""Learner: owns policy and optimizer, and turns a round's trajectories and advantages into new weights and metrics."""

import time

import numpy as np
import torch
from jaxtyping import Float

from ray_ddpo.common.base_parts import Base, entry_base
from ray_ddpo.common.diffusion.lora.adapters import load_weights, read_weights, trained_parameters
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.diffusion.policy_trial import load_checked
from ray_ddpo.common.machine import this_machine
from ray_ddpo.common.policy_weights import PolicyWeights, averaged
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage, local_folder
from ray_ddpo.common.runtime import python_stacks, settle
from ray_ddpo.common.schedule import transition_order
from ray_ddpo.common.trajectory import TrainBatch, Trajectory, TransitionBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.drift import divergence, kl_subset, reference_kl
from ray_ddpo.learner.learning_trial import try_learning
from ray_ddpo.learner.optimization.micro_batch import micro_batch_size
from ray_ddpo.learner.optimization.optimizer import load_optimizer_arrays, optimizer_arrays, optimizer_of
from ray_ddpo.learner.optimization.optimizer_steps import OptimizerSteps, refuse_weights
from ray_ddpo.learner.optimization.sharded_optimizer import ShardedOptimizer
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.round_data.noised_samples import NoisedSamples
from ray_ddpo.learner.round_data.reference_passes import References, Update, references_of
from ray_ddpo.learner.round_data.transitions import RoundTransitions, round_transitions
from ray_ddpo.learner.round_data.transitions_index import TrainingItems, TransitionIndex, micro_batches
from ray_ddpo.learner.temporary_weights import temporary_weights
from ray_ddpo.learner.update_metrics import Divergence, UpdateMetrics
from ray_ddpo.learner.weight_check import Arrival, ArrivalCheck, refuse_mismatch


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
        self._machine = this_machine(self._device)
        self._settings = recipe.learner
        self._algorithm = algorithm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # decides the adapters' initial values
            self._policy = load_checked(policy, self._device, recipe.sampling, "learner")
        try_learning(self._policy, policy, algorithm, recipe)
        self._base = policy.loaded_base("learner") | entry_base(algorithm, "algorithm")
        # Only the loaded model's schedule tells how many steps are stochastic.
        algorithm.check_micro_batches(recipe, len(self._policy.stochastic_steps))
        self._micro_batch_size = micro_batch_size(self._policy, policy, algorithm, recipe)
        self._compiles = policy.is_compiled("learner")
        if self._compiles:
            self._policy.compile(self._micro_batch_size)
        self._parameters = trained_parameters(self._policy.network)
        self._shards_optimizer_state = self._settings.shard_optimizer_state and self._process_group.world_size > 1
        self._optimizer, self._owned = self._make_optimizer()
        self._arrival_check = ArrivalCheck(policy, recipe, self._policy)
        self._scaler = torch.amp.GradScaler(self._device, enabled=policy.dtype == "float16")
        self._steps = OptimizerSteps(
            self._optimizer, self._scaler, self._parameters, self._process_group, self._settings, self._device
        )
        self._version = 0
        self._trained = read_weights(self._policy.network, 0)  # at the start of the round
        self._published = (self._trained,)
        self._metrics = self._no_metrics()  # of the current round
        self._log_ratios: torch.Tensor | None = None  # of the previous round

    def __repr__(self) -> str:
        """Return the name on the dashboard's page of actors, beside run, role and number."""
        return self._called

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
        """Return the optimizer, and the parameters whose optimizer state this rank keeps."""
        if not self._shards_optimizer_state:
            return optimizer_of(self._parameters, self._settings), self._parameters
        optimizer = ShardedOptimizer(self._parameters, self._settings, self._process_group)
        return optimizer, optimizer.owned

    def _no_metrics(self) -> UpdateMetrics:
        return UpdateMetrics(self._policy.num_steps, int(np.prod(self._policy.latent_shape)))

    def join(self, rendezvous: str) -> None:
        """Join the other ranks.

        Raises:
            RuntimeError: the ranks do not start with the same weights.
        """
        self._process_group.join(rendezvous, self._device)
        self._use_micro_batch_size(int(self._process_group.all_reduce_min(self._micro_batch_size)))
        self._process_group.check_equal(self._parameters.values())

    def ready(self) -> Base:
        """Return the fingerprints of the loaded files. The call returns when everything is loaded."""
        return self.loaded_parts()

    def stacks(self) -> str:
        """Return the stacks of this process's threads. Answered from a separate thread during an update."""
        return python_stacks()

    def loaded_parts(self) -> Base:
        """Return the fingerprints of the files that policy and algorithm were loaded from."""
        return self._base

    def weights(self) -> tuple[PolicyWeights, ...]:
        """Return the versions that tasks may still ask samplers for, the newest last."""
        return self._published

    def update(self, batch: TrainBatch, *trajectories: Trajectory) -> tuple[dict[str, float], LearnerState]:
        """Train on a round, or on its last part.

        Returns:
            The round's metrics, and the state after the round with the next version's weights.

        Raises:
            RuntimeError: a trajectory was not sampled with the weights of its version, by its report or by its
                log-probs (WeightsDidNotArrive). The learner is then in the same state as before this call.
        """
        return self._learn_last_part(batch, trajectories), self.state()

    def follow(self, batch: TrainBatch, *trajectories: Trajectory) -> tuple[str, dict[str, np.ndarray]]:
        """Train on a round, or on its last part, on a rank other than 0, whose metrics are not needed.

        Returns:
            The fingerprint of the trained weights, and the optimizer state that only this rank has.
        """
        self._learn_last_part(batch, trajectories)
        own = optimizer_arrays(self._optimizer, self._owned) if self._shards_optimizer_state else {}
        return self._trained.fingerprint, own

    def _learn_last_part(self, batch: TrainBatch, trajectories: tuple[Trajectory, ...]) -> dict[str, float]:
        """Train on the last part of a round, publish the next version, and return the round's metrics."""
        assert batch.part == batch.parts - 1, f"part {batch.part} of {batch.parts} is not the round's last"
        self._learn_from(batch, trajectories)
        trained = read_weights(self._policy.network, self._version + 1)
        refuse_weights(trained, batch.round, self._settings)
        self._version, self._trained = self._version + 1, trained
        decay = self._algorithm.average_decay(self._version)
        published = self._trained if decay is None else averaged(self._published[-1], self._trained, decay)
        self._published = (*self._published, published)[-(self._recipe.max_policy_lag + 1) :]
        metrics, self._metrics = self._metrics, self._no_metrics()
        metrics.gather(self._process_group)
        self._log_ratios = metrics.log_ratios()
        return {**metrics.summary(), "learner/micro_batch_size": float(self._micro_batch_size)}

    def log_ratios(self) -> np.ndarray:
        """Return log_prob − old_log_prob of the last round's transitions; empty before the first round."""
        return np.empty(0) if self._log_ratios is None else self._log_ratios.double().cpu().numpy()

    def begin(self, batch: TrainBatch, *trajectories: Trajectory) -> None:
        """Train on a part of a round that is not its last, and publish nothing. Raises the same errors as `update`."""
        assert batch.part < batch.parts - 1, f"part {batch.part} of {batch.parts} is the round's last"
        self._learn_from(batch, trajectories)

    def _learn_from(self, batch: TrainBatch, trajectories: tuple[Trajectory, ...]) -> None:
        """Check the weights of a part's trajectories, then make the part's optimizer steps."""
        start = time.perf_counter()
        assert batch.part == self._metrics.parts_done, f"part {self._metrics.parts_done} of round {batch.round} is next"
        for report in batch.reports:
            refuse_mismatch(report, self._published, len(self._parameters))
        transitions = round_transitions(trajectories, batch.advantages, self._device)
        present = self._trained if batch.part == 0 else read_weights(self._policy.network, self._version)
        arrival = self._check_arrival(batch, transitions, present)
        items = self._training_items(batch, transitions)
        epochs = [self._optimizer_steps_of(batch, items, epoch) for epoch in range(self._settings.inner_epochs)]
        share = (self._process_group.rank, self._process_group.world_size)
        update = Update(items, epochs, self._sampled_with(batch), present, share, self._compiles)
        references = references_of(self._algorithm, self._policy, update, self._micro_batch_size)
        for steps in epochs:
            for step in steps:
                self._optimizer_step(items, step, references, batch.advantages)
            if self._kl_budget_spent(transitions, steps):
                break
        self._steps.check(batch, self._metrics.optimizer_steps)
        if batch.part == batch.parts - 1:
            self._metrics.set_divergence(self._divergence(transitions, steps))
            if self._needs_reference_kl(self._version + 1):
                some = kl_subset(transitions, steps, self._micro_batch_size, self._process_group)
                self._metrics.set_reference_kl(reference_kl(self._policy, some, self._process_group))
        self._metrics.end_part(time.perf_counter() - start, arrival)

    def _kl_budget_spent(self, transitions: RoundTransitions, steps: list[list[TransitionIndex]]) -> bool:
        """Return whether the KL to the behavior policy is above `learner.max_kl_nats`, so that inner epochs end."""
        budget = self._settings.max_kl_nats
        if budget is None:
            return False
        over = self._metrics.kl_nats(self._divergence(transitions, steps)) > budget
        return (
            self._process_group.all_reduce_max(over) > 0
        )  # all ranks stop or none, even if their machines round differently

    def _check_arrival(self, batch: TrainBatch, transitions: RoundTransitions, present: PolicyWeights) -> Arrival:
        """Check that the samplers had the weights of the round's version.

        Every round is checked, so that a resumed run needs no memory of earlier checks. Every rank checks the same
        transitions, and with them its own numerics.
        """
        with self._process_group.raise_on_all_ranks():
            found = self._arrival_check.check(batch, transitions, self._sampled_with(batch), present, self._machine)
        rounding = None if found.rounding is None else self._process_group.all_reduce_max(found.rounding)
        return Arrival(self._process_group.all_reduce_max(found.largest), rounding)

    def _sampled_with(self, batch: TrainBatch) -> PolicyWeights:
        (version,) = {
            report.task.policy_version for report in batch.reports
        }  # the schedule gives a round a single version
        return next(weights for weights in self._published if weights.policy_version == version)

    def _training_items(self, batch: TrainBatch, transitions: RoundTransitions) -> TrainingItems:
        """Return the algorithm's training items: the sampled transitions, or the finished images with noise added."""
        per_image = self._algorithm.noised_samples_per_image
        if per_image is None:
            return transitions
        seeds = tuple(seed for report in batch.reports for seed in report.task.seeds)
        return NoisedSamples(transitions, seeds, per_image, self._policy.num_train_timesteps)

    def _optimizer_steps_of(
        self, batch: TrainBatch, items: TrainingItems, inner_epoch: int
    ) -> list[list[TransitionIndex]]:
        """Return the indices of each optimizer step of an inner epoch."""
        part = (batch.part, batch.parts)
        order = transition_order(self._recipe.seed, batch.round, inner_epoch, items.num_images, part)
        order = order[self._algorithm.trained_images(batch.advantages)[order]]
        return items.optimizer_steps(order, self._settings.images_per_step, batch.dropped, inner_epoch)

    def _optimizer_step(
        self,
        items: TrainingItems,
        indices: list[TransitionIndex],
        references: References,
        advantages: Float[np.ndarray, "N"],
    ) -> None:
        """Accumulate the gradients of this rank's micro-batches, and apply the step."""
        self._steps.begin()
        own = self._process_group.share(indices)
        for micro_batch in micro_batches(own, self._micro_batch_size):
            known = references.added_to(items.batch(micro_batch), micro_batch)
            result = self._algorithm.compute_loss(self._policy, known)
            self._steps.add(result, len(indices))
            self._metrics.add_micro_batch(result, known.steps if isinstance(known, TransitionBatch) else None)
        # Only if all images of the step have the same advantage, the gradient may be exactly 0.
        may_be_zero = len({advantages[image] for image, _ in indices}) == 1
        norm = self._steps.apply(len(indices), len(own), may_be_zero)
        if norm is None:
            self._metrics.skip_optimizer_step()
        else:
            self._metrics.end_optimizer_step(norm)

    def _divergence(self, transitions: RoundTransitions, steps: list[list[TransitionIndex]]) -> Divergence:
        some = kl_subset(transitions, steps, self._micro_batch_size, self._process_group)
        return divergence(self._policy, some, self._process_group, self._compiles)

    def _needs_reference_kl(self, policy_version: int) -> bool:
        """Return whether this version is evaluated and the pretrained policy is available (LoRA only)."""
        due = self._recipe.evaluation.is_due(policy_version, self._recipe.rounds)
        return due and self._recipe.policy.table().get("train", "lora") == "lora"

    def state(self) -> LearnerState:
        """Return a copy of all state. If optimizer state is sharded, the copy has this rank's shard only."""
        optimizer = optimizer_arrays(self._optimizer, self._owned)
        own = None if self._trained.fingerprint == self._published[-1].fingerprint else self._trained
        state = (self._version, self._published, optimizer, self._scaler.state_dict(), own)
        return LearnerState(*state, self._micro_batch_size, self._machine)

    def load_state(self, state: LearnerState) -> None:
        """Resume from `state`, and discard the parts of a round that were begun.

        Raises:
            ValueError: the state belongs to another network.
        """
        load_weights(self._policy.network, state.trained)
        load_optimizer_arrays(self._optimizer, self._owned, state.optimizer)
        self._metrics, self._log_ratios = self._no_metrics(), None
        self._steps.forget()
        if state.scaler:
            self._scaler.load_state_dict(state.scaler)
        self._version, self._published, self._trained = state.policy_version, state.weights, state.trained
        # A size that was found by trial must stay: another size gives other last bits.
        if self._settings.micro_batch_size == "auto" and state.micro_batch_size is not None:
            self._use_micro_batch_size(state.micro_batch_size)

    def _use_micro_batch_size(self, size: int) -> None:
        if size == self._micro_batch_size:
            return
        self._micro_batch_size = size
        if self._compiles:
            self._policy.compile(size)

    def check_folder(self, location: str, token: str) -> None:
        """Check that the run's folder is the same as on the driver's machine.

        Raises:
            ValueError: the folder is another one on this machine, so that the trained weights would be lost.
        """
        if not RunFolder(location).has_token(token):
            raise ValueError(
                f"output_dir: {location} on the learner's machine is not the driver's: what the learner writes there "
                "would be lost; give --output_dir a path on storage that all nodes see, or a URI (s3://…)"
            )

    def save_policy(self, location: str, weights: PolicyWeights | None = None) -> str:
        """Write the trained weights, or `weights`, for diffusers into a run's folder, and return their location."""
        storage, present = Storage(location), self._trained
        with local_folder(storage) as folder, temporary_weights(self._policy.network, weights or present, present):
            written = self._policy.save(folder).relative_to(folder)
        return storage.folder(str(written)).location

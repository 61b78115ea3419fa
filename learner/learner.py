"""Learner: owns policy and optimizer; turns a round's trajectories and advantages into new weights and metrics."""

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
from ray_ddpo.learner.drift import divergence, few, reference_kl
from ray_ddpo.learner.learning_trial import try_learning
from ray_ddpo.learner.optimization.micro_batch import micro_batch_size
from ray_ddpo.learner.optimization.optimizer import load_optimizer_arrays, optimizer_arrays, optimizer_of
from ray_ddpo.learner.optimization.optimizer_steps import OptimizerSteps, refuse_weights
from ray_ddpo.learner.optimization.sharded_optimizer import ShardedOptimizer
from ray_ddpo.learner.process_group import Ranks
from ray_ddpo.learner.round_data.noised_samples import NoisedSamples
from ray_ddpo.learner.round_data.reference_passes import References, Update, references_of
from ray_ddpo.learner.round_data.transitions import RoundTransitions, round_transitions
from ray_ddpo.learner.round_data.transitions_index import TrainingItems, TransitionIndex, micro_batches
from ray_ddpo.learner.temporary_weights import temporary_weights
from ray_ddpo.learner.update_metrics import Divergence, UpdateMetrics
from ray_ddpo.learner.weight_check import Arrival, ArrivalCheck, refuse_mismatch


class Learner:
    """One process, one device. `update` is a pure function of its state, the batch and the trajectories.

    Of several ranks, each is such a process with its share of every optimizer step; all are called alike, in one order.
    """

    def __init__(self, policy: PolicyConfig, algorithm: Algorithm, recipe: Recipe, ranks: Ranks | None = None) -> None:
        """`ranks`: its place among several; it has to `join` them. None: it is the only one."""
        self._ranks = ranks or Ranks()
        self._called = (
            f"Learner{f' {self._ranks},' if self._ranks.count > 1 else ''} of {policy.model} by {recipe.algorithm.name}"
        )
        self._device = settle(recipe.runtime)
        self._called += f" on {self._device}"
        self._recipe = recipe
        self._machine = this_machine(self._device)
        self._settings = recipe.learner
        self._algorithm = algorithm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # the adapters' first values
            self._policy = load_checked(policy, self._device, recipe.sampling, "learner")
        try_learning(self._policy, policy, algorithm, recipe)
        self._base = policy.loaded_base("learner") | entry_base(algorithm, "algorithm")
        # Only the loaded model's schedule tells how many steps have noise.
        algorithm.check_micro_batches(recipe, len(self._policy.stochastic_steps))
        self._micro_batch_size = micro_batch_size(self._policy, policy, algorithm, recipe)
        self._compiles = policy.is_compiled("learner")
        if self._compiles:
            self._policy.compile(self._micro_batch_size)
        self._parameters = trained_parameters(self._policy.network)
        self._divides_moments = self._settings.shard_optimizer_state and self._ranks.count > 1
        self._optimizer, self._owned = self._make_optimizer()
        self._arrival_check = ArrivalCheck(policy, recipe, self._policy)
        self._scaler = torch.amp.GradScaler(self._device, enabled=policy.dtype == "float16")
        self._steps = OptimizerSteps(
            self._optimizer, self._scaler, self._parameters, self._ranks, self._settings, self._device
        )
        self._version = 0
        self._trained = read_weights(self._policy.network, 0)  # at the start of the round
        self._published = (self._trained,)
        self._metrics = self._no_metrics()  # of the round that is being learned from
        self._log_ratios: torch.Tensor | None = None  # of the round before it

    def __repr__(self) -> str:
        """As the dashboard's page of actors has it, beside run, role and number."""
        return self._called

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
        """And the parameters whose moments it keeps here."""
        if not self._divides_moments:
            return optimizer_of(self._parameters, self._settings), self._parameters
        optimizer = ShardedOptimizer(self._parameters, self._settings, self._ranks)
        return optimizer, optimizer.owned

    def _no_metrics(self) -> UpdateMetrics:
        return UpdateMetrics(self._policy.num_steps, int(np.prod(self._policy.latent_shape)))

    def join(self, rendezvous: str) -> None:
        """Find the other ranks. RuntimeError: they do not begin with the same weights."""
        self._ranks.join(rendezvous, self._device)
        self._use_micro_batch_size(int(self._ranks.least(self._micro_batch_size)))
        self._ranks.check_equal(self._parameters.values())

    def ready(self) -> Base:
        """Return what was loaded, once it is."""
        return self.loaded_parts()

    def stacks(self) -> str:
        """What this process is doing; answered from a thread of its own while it learns."""
        return python_stacks()

    def loaded_parts(self) -> Base:
        """Return the fingerprints of what policy and algorithm were made from."""
        return self._base

    def weights(self) -> tuple[PolicyWeights, ...]:
        """The versions that samplers may still be asked for, the newest last."""
        return self._published

    def update(self, batch: TrainBatch, *trajectories: Trajectory) -> tuple[dict[str, float], LearnerState]:
        """Learn from a round, or from its last part; its metrics, and the state after it with the next version's weights.

        RuntimeError: a trajectory was not sampled with the weights that its version stands for, as its report says, or
        as its log-probs say (WeightsDidNotArrive). The learner is then as it was before this call.
        """
        return self._learn_last_part(batch, trajectories), self.state()

    def follow(self, batch: TrainBatch, *trajectories: Trajectory) -> tuple[str, dict[str, np.ndarray]]:
        """`update` on a rank whose metrics nobody asks for: its weights' fingerprint, and the moments that it alone has."""
        self._learn_last_part(batch, trajectories)
        own = optimizer_arrays(self._optimizer, self._owned) if self._divides_moments else {}
        return self._trained.fingerprint, own

    def _learn_last_part(self, batch: TrainBatch, trajectories: tuple[Trajectory, ...]) -> dict[str, float]:
        assert batch.part == batch.parts - 1, f"part {batch.part} of {batch.parts} is not the round's last"
        self._learn_from(batch, trajectories)
        trained = read_weights(self._policy.network, self._version + 1)
        refuse_weights(trained, batch.round, self._settings)
        self._version, self._trained = self._version + 1, trained
        decay = self._algorithm.average_decay(self._version)
        published = self._trained if decay is None else averaged(self._published[-1], self._trained, decay)
        self._published = (*self._published, published)[-(self._recipe.max_policy_lag + 1) :]
        metrics, self._metrics = self._metrics, self._no_metrics()
        metrics.gather(self._ranks)
        self._log_ratios = metrics.log_ratios()
        return {**metrics.summary(), "learner/micro_batch_size": float(self._micro_batch_size)}

    def log_ratios(self) -> np.ndarray:
        """log_prob − old_log_prob of the pairs of the last round learned from; empty where there is none."""
        return np.empty(0) if self._log_ratios is None else self._log_ratios.double().cpu().numpy()

    def begin(self, batch: TrainBatch, *trajectories: Trajectory) -> None:
        """Learn from a part of a round that is not its last: nothing is published yet. Errors are those of `update`."""
        assert batch.part < batch.parts - 1, f"part {batch.part} of {batch.parts} is the round's last"
        self._learn_from(batch, trajectories)

    def _learn_from(self, batch: TrainBatch, trajectories: tuple[Trajectory, ...]) -> None:
        start = time.perf_counter()
        assert batch.part == self._metrics.parts_done, f"part {self._metrics.parts_done} of round {batch.round} is next"
        for report in batch.reports:
            refuse_mismatch(report, self._published, len(self._parameters))
        transitions = round_transitions(trajectories, batch.advantages, self._device)
        present = self._trained if batch.part == 0 else read_weights(self._policy.network, self._version)
        arrival = self._check_arrival(batch, transitions, present)
        pairs = self._pairs_of(batch, transitions)
        epochs = [self._optimizer_steps_of(batch, pairs, epoch) for epoch in range(self._settings.inner_epochs)]
        share = (self._ranks.rank, self._ranks.count)
        update = Update(pairs, epochs, self._drawn_with(batch), present, share, self._compiles)
        references = references_of(self._algorithm, self._policy, update, self._micro_batch_size)
        for steps in epochs:
            for step in steps:
                self._optimizer_step(pairs, step, references, batch.advantages)
            if self._spent(transitions, steps):
                break
        self._steps.check(batch, self._metrics.optimizer_steps)
        if batch.part == batch.parts - 1:
            self._metrics.set_divergence(self._divergence(transitions, steps))
            if self._asks_for_reference(self._version + 1):
                some = few(transitions, steps, self._micro_batch_size, self._ranks)
                self._metrics.set_reference_kl(reference_kl(self._policy, some, self._ranks))
        self._metrics.end_part(time.perf_counter() - start, arrival)

    def _spent(self, transitions: RoundTransitions, steps: list[list[TransitionIndex]]) -> bool:
        """Whether the inner epochs have moved the policy as far from the one that sampled as the recipe allows."""
        budget = self._settings.max_kl_nats
        if budget is None:
            return False
        over = self._metrics.kl_nats(self._divergence(transitions, steps)) > budget
        return self._ranks.largest(over) > 0  # all stop or none, also where their machines round differently

    def _check_arrival(self, batch: TrainBatch, transitions: RoundTransitions, present: PolicyWeights) -> Arrival:
        """Every round is checked, and most have a version of their own: so nothing is to be remembered over a resume.

        Every rank checks the same transitions, its own numerics with them.
        """
        with self._ranks.failing_together():
            found = self._arrival_check.check(batch, transitions, self._drawn_with(batch), present, self._machine)
        rounding = None if found.rounding is None else self._ranks.largest(found.rounding)
        return Arrival(self._ranks.largest(found.largest), rounding)

    def _drawn_with(self, batch: TrainBatch) -> PolicyWeights:
        (version,) = {report.task.policy_version for report in batch.reports}  # the schedule gives a round one version
        return next(weights for weights in self._published if weights.policy_version == version)

    def _pairs_of(self, batch: TrainBatch, transitions: RoundTransitions) -> TrainingItems:
        """What the algorithm learns from: the path's own steps, or its finished images noised again."""
        per_image = self._algorithm.noised_samples_per_image
        if per_image is None:
            return transitions
        seeds = tuple(seed for report in batch.reports for seed in report.task.seeds)
        return NoisedSamples(transitions, seeds, per_image, self._policy.num_train_timesteps)

    def _optimizer_steps_of(
        self, batch: TrainBatch, pairs: TrainingItems, inner_epoch: int
    ) -> list[list[TransitionIndex]]:
        """The pairs of each optimizer step of an inner epoch."""
        place = (batch.part, batch.parts)
        order = transition_order(self._recipe.seed, batch.round, inner_epoch, pairs.num_images, place)
        order = order[self._algorithm.teaches(batch.advantages)[order]]
        return pairs.optimizer_steps(order, self._settings.images_per_step, batch.dropped, inner_epoch)

    def _optimizer_step(
        self, source: TrainingItems, pairs: list[TransitionIndex], references: References, worth: Float[np.ndarray, "N"]
    ) -> None:
        self._steps.begin()
        own = self._ranks.share(pairs)
        for micro_batch in micro_batches(own, self._micro_batch_size):
            known = references.laid_into(source.batch(micro_batch), micro_batch)
            result = self._algorithm.compute_loss(self._policy, known)
            self._steps.add(result, len(pairs))
            self._metrics.add_micro_batch(result, known.steps if isinstance(known, TransitionBatch) else None)
        norm = self._steps.apply(len(pairs), len(own), may_be_zero=_are_equal(worth, pairs))
        if norm is None:
            self._metrics.leave_out_optimizer_step()
        else:
            self._metrics.end_optimizer_step(norm)

    def _divergence(self, transitions: RoundTransitions, steps: list[list[TransitionIndex]]) -> Divergence:
        some = few(transitions, steps, self._micro_batch_size, self._ranks)
        return divergence(self._policy, some, self._ranks, self._compiles)

    def _asks_for_reference(self, policy_version: int) -> bool:
        """Whether this version is evaluated, and the pretrained policy is at hand to be held against it."""
        due = self._recipe.evaluation.is_due(policy_version, self._recipe.rounds)
        return due and self._recipe.policy.table().get("train", "lora") == "lora"

    def state(self) -> LearnerState:
        """A copy of all state; where ranks divide the moments, with this one's."""
        optimizer = optimizer_arrays(self._optimizer, self._owned)
        own = None if self._trained.fingerprint == self._published[-1].fingerprint else self._trained
        state = (self._version, self._published, optimizer, self._scaler.state_dict(), own)
        return LearnerState(*state, self._micro_batch_size, self._machine)

    def load_state(self, state: LearnerState) -> None:
        """Go on from `state`; what was begun of a round is undone. ValueError: it belongs to another network."""
        load_weights(self._policy.network, state.trained)
        load_optimizer_arrays(self._optimizer, self._owned, state.optimizer)
        self._metrics, self._log_ratios = self._no_metrics(), None
        self._steps.forget()
        if state.scaler:
            self._scaler.load_state_dict(state.scaler)
        self._version, self._published, self._trained = state.policy_version, state.weights, state.trained
        # Where it was found and not given, go on with what was found: another one has other last bits.
        if self._settings.micro_batch_size == "auto" and state.micro_batch_size is not None:
            self._use_micro_batch_size(state.micro_batch_size)

    def _use_micro_batch_size(self, size: int) -> None:
        if size == self._micro_batch_size:
            return
        self._micro_batch_size = size
        if self._compiles:
            self._policy.compile(size)

    def check_folder(self, location: str, token: str) -> None:
        """ValueError: the run's folder is not the driver's, seen from here, so that the trained weights would be lost."""
        if not RunFolder(location).has_token(token):
            raise ValueError(
                f"output_dir: {location} on the learner's machine is not the driver's: what the learner writes there would be "
                "lost; give --output_dir a path on storage that all nodes see, or a URI (s3://…)"
            )

    def save_policy(self, location: str, weights: PolicyWeights | None = None) -> str:
        """Write the trained weights, or those given, for diffusers into a run's folder; where they lie."""
        storage, present = Storage(location), self._trained
        with local_folder(storage) as folder, temporary_weights(self._policy.network, weights or present, present):
            written = self._policy.save(folder).relative_to(folder)
        return storage.folder(str(written)).location


def _are_equal(worth: Float[np.ndarray, "N"], pairs: list[TransitionIndex]) -> bool:
    """Return whether all images of an optimizer step are worth the same. Only then its gradient may be exactly 0."""
    return len({worth[image] for image, _ in pairs}) == 1

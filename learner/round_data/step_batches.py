"""StepBatches: the micro-batches of an optimizer step, with precomputed columns and the slopes of coupled losses."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.compiled import graph_of_learning
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.trajectory import NoisedBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.coupled import CoupledForwardProcess
from ray_ddpo.learner.round_data.noised_samples import NoisedSamples
from ray_ddpo.learner.round_data.reference_passes import (
    Batch,
    Update,
    denoising_errors,
    precomputed_columns,
    with_columns,
)
from ray_ddpo.learner.round_data.transitions import Indices, micro_batches


@final
class StepBatches:
    """The micro-batches of a round's optimizer steps on this rank.

    A loss that compares the images of a group needs all of its rows at once. If ranks or micro-batches part groups, the
    loss's slopes come from a pass without gradient under the weights at the start of the step.
    """

    def __init__(self, algorithm: Algorithm, policy: Policy, update: Update, micro_batch_size: int) -> None:
        """Precompute the columns that the algorithm asks for."""
        self._algorithm = algorithm
        self._policy = policy
        self._update = update
        self._size = micro_batch_size
        self._columns = precomputed_columns(algorithm, policy, update, micro_batch_size)

    def of_step(self, indices: Indices, passed: Indices, num_own: int) -> Iterator[tuple[Batch, int]]:
        """Yield each micro-batch, and how many of its rows are this rank's own. A collective if the loss is coupled.

        Args:
            indices: of the optimizer step.
            passed: those that this rank passes: its own, and then what it passes for other ranks' sake.
            num_own: how many of these are its own.
        """
        coupling = self._coupling(indices, passed, num_own) if self._parts_groups(indices) else None
        for start, some in zip(count(0, self._size), micro_batches(passed, self._size)):
            batch = self._batch(some)
            if coupling is not None:
                assert isinstance(batch, NoisedBatch), "a coupled loss is of noised samples"
                batch = replace(batch, coupling=coupling[start : start + len(some)].to(self._policy.device))
            yield batch, min(len(some), max(0, num_own - start))

    def _batch(self, indices: Indices) -> Batch:
        return with_columns(self._update.items.batch(indices), self._columns, indices, self._policy.device)

    def _parts_groups(self, indices: Indices) -> bool:
        """Return whether a rank or a micro-batch may have a part of a group whose images the loss compares."""
        if not isinstance(self._algorithm, CoupledForwardProcess) or not len(indices):
            return False
        assert isinstance(self._update.items, NoisedSamples), "a coupled loss is of noised samples"
        group = self._algorithm.images_compared(self._update.items.sharing_images)
        whole = self._size % group == 0 or self._size >= len(indices)
        return self._update.process_group.world_size > 1 or not whole

    def _coupling(self, indices: Indices, passed: Indices, num_own: int) -> Float[Tensor, "M 4"]:
        """Return the coupling of the rows that this rank passes. A collective."""
        assert isinstance(self._algorithm, CoupledForwardProcess) and isinstance(self._update.items, NoisedSamples)
        own = self._errors(passed)
        place = {(image, position): row for row, (image, position) in enumerate(indices.tolist())}
        rows = torch.tensor([place[image, position] for image, position in passed.tolist()], dtype=torch.int64)
        # Each row is one rank's, and 0 on the others, so that the sum over ranks is exact.
        mine = torch.zeros(len(indices), own.shape[1], dtype=torch.float64)
        mine[rows[:num_own]] = own[:num_own]
        gathered = self._update.process_group.all_gather(mine.flatten())
        assert gathered is not None, "an optimizer step has rows"
        errors, old, reference = gathered.cpu().view(-1, *mine.shape).sum(0).unbind(1)
        signals = self._update.items.transitions.advantages.cpu()[indices[:, 0]]
        return self._algorithm.coupling(errors, reference, old, signals, self._update.items.groups(indices))[rows]

    def _errors(self, passed: Indices) -> Float[Tensor, "M 3"]:
        """Return the rows' errors under the current, the sampling and the reference weights, on the host.

        A column that was not asked for, or whose weights are the current ones, is as the first.
        """
        found = [torch.empty(0, 3, dtype=torch.float64)]
        with graph_of_learning(self._update.is_compiled):
            for indices in micro_batches(passed, self._size):
                batch = self._batch(indices)
                assert isinstance(batch, NoisedBatch), "a coupled loss is of noised samples"
                errors = denoising_errors(self._policy, batch).detach()
                known = (batch.old_errors, batch.reference_errors)
                columns = [errors, *(errors if each is None else each for each in known)]
                found.append(torch.stack(columns, 1).double().cpu())
        return torch.cat(found)

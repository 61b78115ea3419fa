"""ProcessGroup: the ranks of one learner, their rendezvous, and the collectives between them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import final

import torch
import torch.distributed as distributed
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ray_ddpo.common.recipe.recipe import Recipe

# The integer dtype to view an element's bits as, by the element's size in bytes.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Parts of the errors of NCCL and torch if ranks share a GPU, or if torch was built without NCCL.
SET_UP_WRONGLY = ("ncclInvalidUsage", "ncclInvalidArgument", "doesn't have NCCL built in")
BUCKET_BYTES = 2**28  # sent in one call: large enough to hide the cost of a call, small beside a network


class RankLost(RuntimeError):
    """A rank no longer answers the others: its process or its machine is gone."""


class OtherRankFailed(RuntimeError):
    """Another rank cannot continue, and reports the reason itself."""


def error_of_collective(rank: object, error: RuntimeError) -> Exception:
    """Return the error that an error of torch.distributed stands for.

    Args:
        rank: the rank that the error occurred on, in words.

    Returns:
        A ValueError if every start would fail alike because the ranks are set up wrongly. The error itself if memory
        ran out. Otherwise RankLost: a backend cannot tell what happened to the other ranks. NCCL reports a dead rank as
        a remote, a system or an internal error, whichever it noticed first.
    """
    if isinstance(error, RankLost | torch.OutOfMemoryError):
        return error
    said = " ".join(str(error).split("Exception raised from")[0].split())  # without the frames of C++
    if any(words in said for words in SET_UP_WRONGLY):
        return ValueError(
            f"learner.world_size: {rank} cannot compute with NCCL: {said}; give each rank a GPU of its own, or set "
            "learner.num_gpus to 0.5 or less, with which ranks may share a GPU and do not use NCCL"
        )
    return RankLost(f"{rank} has lost the others: {said}")


def is_lost_rank(error: object) -> bool:
    """Return whether an error means that another rank is gone, even if the error was raised outside a collective."""
    return isinstance(error, RankLost | distributed.DistError)


@final
class Rendezvous:
    """The rendezvous of the ranks, on a free port of the process that holds this object. Must outlive the ranks."""

    def __init__(self, host: str) -> None:
        """Open the port.

        Args:
            host: this machine's address, as the ranks' machines know it.
        """
        self._store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.address = f"{host}:{self._store.port}"


@final
class ProcessGroup:
    """A rank of a learner and its collectives. Small and picklable until the rank has joined the others.

    A single rank has no torch process group, and its collectives return their input. With several ranks, every method
    but `share` is a collective: all ranks must call the same ones in the same order. A collective raises RankLost if a
    rank does not.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, own_gpu: bool = True, timeout_seconds: float = 600.0
    ) -> None:
        """Describe a rank.

        Args:
            own_gpu: no two ranks share a GPU, which NCCL requires.
            timeout_seconds: the longest wait of a collective.
        """
        self.rank = rank
        self.world_size = world_size
        self._own_gpu = own_gpu
        self._timeout = timedelta(seconds=timeout_seconds)
        self._device = "cpu"  # of the tensors that are sent

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"

    def join(self, rendezvous: str, device: str) -> None:
        """Join the other ranks, with NCCL between GPUs and gloo otherwise.

        Args:
            rendezvous: the address of a `Rendezvous`.
        """
        host, _, port = rendezvous.rpartition(":")
        backend = "nccl" if device.startswith("cuda") and self._own_gpu else "gloo"
        with self._converted_errors():
            store = distributed.TCPStore(
                host, int(port), is_master=False, timeout=self._timeout, wait_for_workers=False
            )
            distributed.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world_size, timeout=self._timeout
            )
        self._device = device if backend == "nccl" else "cpu"

    def share(self, indices: Int[Tensor, "B 2"]) -> Int[Tensor, "M 2"]:
        """Return this rank's share of an optimizer step: all items of every `world_size`-th image. Not a collective.

        All ranks have equally many images, unless images are dropped and `world_size` does not divide the rest. Then
        some ranks have one more.

        Args:
            indices: (image, step) indices.
        """
        if self.world_size == 1:
            return indices
        own = list(dict.fromkeys(indices[:, 0].tolist()))[self.rank :: self.world_size]
        return indices[torch.isin(indices[:, 0], torch.tensor(own, dtype=torch.int64))]

    def share_of_step(self, indices: Int[Tensor, "B 2"], even: bool) -> tuple[Int[Tensor, "M 2"], int]:
        """Return the items that this rank passes, and how many of them are its own share. Not a collective.

        Args:
            even: give a rank with an image less than others one of theirs behind its own, because all ranks must take
                part in every pass.
        """
        own = self.share(indices)
        images = list(dict.fromkeys(indices[:, 0].tolist()))
        more = len(images) % self.world_size  # ranks with an image more than the others
        if not even or not more or self.rank < more:
            return own, len(own)
        return torch.cat([own, indices[indices[:, 0] == images[0]]]), len(own)

    def mesh(self) -> DeviceMesh:
        """Return all ranks as torch's mesh of one axis, whose collectives have this group's backend. A collective."""
        with self._converted_errors():
            return init_device_mesh(torch.device(self._device).type, (self.world_size,))

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum every gradient over all ranks, a missing one as 0, to the same bits on each."""
        if self.world_size == 1:
            return
        trained = list(parameters)
        (dtype,) = {parameter.dtype for parameter in trained}
        for gradients in _buckets([_gradient(parameter) for parameter in trained]):
            buffer = self._flattened(gradients)
            assert buffer.dtype == dtype, "gradients have their parameters' dtype"
            with self._converted_errors():
                distributed.all_reduce(buffer)
            _copy_into(gradients, buffer)

    def broadcast(self, rank: int, tensors: Iterable[Tensor]) -> None:
        """Copy the values that `rank` has in these tensors into those of all other ranks."""
        for of_bucket in _buckets(list(tensors)) if self.world_size > 1 else ():
            buffer = self._flattened(of_bucket)
            with self._converted_errors():
                distributed.broadcast(buffer, src=rank)
            if rank != self.rank:
                _copy_into(of_bucket, buffer)

    def _flattened(self, tensors: list[Tensor]) -> Float[Tensor, "N"]:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(self._device)

    def all_reduce_sum(self, number: float | int) -> float | int:
        """Return the sum of all ranks' numbers."""
        return self._all_reduce(number, distributed.ReduceOp.SUM)

    def all_reduce_max(self, number: float | int) -> float | int:
        """Return the largest of all ranks' numbers."""
        return self._all_reduce(number, distributed.ReduceOp.MAX)

    def all_reduce_min(self, number: float | int) -> float | int:
        """Return the smallest of all ranks' numbers."""
        return self._all_reduce(number, distributed.ReduceOp.MIN)

    def _all_reduce(self, number: float | int, operation: distributed.ReduceOp.RedOpType) -> float | int:
        if self.world_size == 1:
            return number
        found = torch.tensor(float(number), dtype=torch.float64, device=self._device)
        with self._converted_errors():
            distributed.all_reduce(found, operation)
            return float(found)  # NCCL's errors are raised when its result is read

    def all_gather(self, values: Float[Tensor, "N"] | Int[Tensor, "N"] | None) -> Float[Tensor, "M"] | None:
        """Concatenate all ranks' values, in the order of ranks, as float64, which holds them exactly.

        Returns:
            None if no rank has any values.
        """
        if self.world_size == 1:
            return None if values is None else values.double()
        found = torch.empty(0) if values is None else values
        lengths = self._all_gather_numbers(len(found))
        if not any(lengths):
            return None
        own = torch.zeros(max(lengths), dtype=torch.float64, device=self._device)
        own[: len(found)] = found.to(self._device)
        return torch.cat([row[:length] for row, length in zip(self._all_gather_rows(own), lengths, strict=True)])

    def all_gather_rows(self, own: Float[Tensor, "N"], lengths: list[int]) -> list[Float[Tensor, "_"]]:
        """Return all ranks' vectors, in the order of ranks, in the host's memory.

        Args:
            lengths: of each rank's vector.
        """
        if self.world_size == 1:
            return [own]
        padded = own.new_zeros(max(lengths), device=self._device)
        padded[: len(own)] = own.to(self._device)
        return [row[:length].cpu() for row, length in zip(self._all_gather_rows(padded), lengths, strict=True)]

    def check_equal(self, parameters: Iterable[nn.Parameter]) -> None:
        """Compare the weights of all ranks, bit for bit.

        Raises:
            RuntimeError: the weights of a rank, which the error names, differ from those of rank 0.
        """
        if self.world_size == 1:
            return
        sums = self._all_gather_numbers(_sum_of_bits(parameters))
        differing = [rank for rank, found in enumerate(sums) if found != sums[0]]
        if differing:
            raise RuntimeError(
                f"the weights of rank {', '.join(map(str, differing))} of {self.world_size} are not those of rank 0: "
                "a GPU computes wrongly, or ranks are of different kinds"
            )

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise on every rank if any rank raises; otherwise the others deadlock in the next collective."""
        failed = True
        try:
            yield
            failed = False
        finally:
            others = self.all_reduce_sum(failed)
        if others:
            raise OtherRankFailed("another rank failed, and reports the reason itself")

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Convert errors of collectives inside the network's passes, which sharded weights are gathered with.

        Raises:
            RankLost: a collective failed, since another rank is gone.
        """
        try:
            yield
        except RankLost:
            raise
        except RuntimeError as error:
            if not _is_of_a_collective(error):
                raise
            raise error_of_collective(self, error) from error

    def _all_gather_numbers(self, number: int) -> list[int]:
        own = torch.tensor([number], dtype=torch.int64, device=self._device)
        with self._converted_errors():
            return torch.cat(self._all_gather_rows(own)).tolist()

    def _all_gather_rows(self, own: Tensor) -> list[Tensor]:
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        with self._converted_errors():
            distributed.all_gather(rows, own)
        return rows

    @contextmanager
    def _converted_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the base class of every backend's errors
            raise error_of_collective(self, error) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Return whether a backend raised this error. Gloo's errors have no class of their own, but its file in the text."""
    return isinstance(error, distributed.DistError) or "/gloo/" in str(error)


def process_groups(recipe: Recipe) -> tuple[ProcessGroup, ...]:
    """Return a process group for each rank of a recipe's learner.

    Two ranks may share a GPU if each asks for half of one or less, unless each shares one with a sampler.
    """
    world_size, runtime = recipe.learner.world_size, recipe.runtime
    own_gpu = recipe.learner.num_gpus > 0.5 or recipe.learner.colocated
    # Longer than the driver's own limits, so that the driver finds out first which process is to blame.
    seconds = runtime.ready_seconds + runtime.watchdog_seconds
    return tuple(ProcessGroup(rank, world_size, own_gpu, seconds) for rank in range(world_size))


def buffer_bytes(trained_parameters: int, world_size: int) -> int:
    """Return the memory of the buffer in which a rank sends gradients or weights."""
    return min(4 * trained_parameters, BUCKET_BYTES) if world_size > 1 else 0


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors, in their order, into buckets of at most BUCKET_BYTES; a larger tensor is a bucket alone."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.nbytes
    yield bucket


@torch.no_grad()
def _copy_into(tensors: list[Tensor], buffer: Float[Tensor, "N"]) -> None:
    """Copy the numbers of a flat buffer back into the tensors that it was made from."""
    for tensor, part in zip(tensors, buffer.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@torch.no_grad()
def _sum_of_bits(parameters: Iterable[nn.Parameter]) -> int:
    """Sum the bits as integers, exact in any order; each parameter's sum is weighted by its position."""
    sums = [parameter.view(BITS[parameter.element_size()]).sum(dtype=torch.int64) for parameter in parameters]
    return int((torch.stack(sums) * torch.arange(1, len(sums) + 1, device=sums[0].device)).sum())

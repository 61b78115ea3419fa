"""Ranks: the processes that are one learner; how they meet, and what they sum up, gather and hold against each other."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import final

import torch
import torch.distributed as distributed
from jaxtyping import Float, Int
from torch import Tensor, nn

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.learner.round_data.transitions_index import TransitionIndex, share_of

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element: what its bits are read as
# What NCCL and torch say where ranks share a GPU, or where torch has no NCCL.
SET_UP_WRONGLY = ("ncclInvalidUsage", "ncclInvalidArgument", "doesn't have NCCL built in")
BUCKET_BYTES = 2**28  # that travel at once: enough to be rid of every call's own cost, and little beside a network


class RankLost(RuntimeError):
    """A rank does not answer the others any more: its process or its machine is gone."""


class OtherRankFailed(RuntimeError):
    """Another rank cannot go on, and says itself why."""


def error_of_collective(ranks: object, error: RuntimeError) -> Exception:
    """Return what an error of torch.distributed stands for; `ranks`: the rank that met it, in words.

    Returns:
        A ValueError where every start of the ranks would meet it again, because they are set up wrongly; the error itself
        where memory ran out; else RankLost. A backend cannot tell what has become of the others: a dead rank is a remote, a
        system or an internal error of NCCL's, whatever was noticed first.
    """
    if isinstance(error, RankLost | torch.OutOfMemoryError):
        return error
    said = " ".join(str(error).split("Exception raised from")[0].split())  # without the frames of C++
    if any(words in said for words in SET_UP_WRONGLY):
        return ValueError(
            f"learner.world_size: {ranks} cannot compute with NCCL: {said}; give each rank a GPU of its own, or set "
            "learner.num_gpus to 0.5 or less, with which ranks may share a GPU and do not use NCCL"
        )
    return RankLost(f"{ranks} has lost the others: {said}")


def is_lost_rank(error: object) -> bool:
    """Return whether an error of a rank says that another one is gone, though it was raised outside of a collective."""
    return isinstance(error, RankLost | distributed.DistError)


@final
class Rendezvous:
    """Where ranks find each other: on a free port of the process that holds this, which has to outlive them."""

    def __init__(self, host: str) -> None:
        """`host`: under which address the ranks' machines know this one."""
        self._store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.address = f"{host}:{self._store.port}"


@final
class Ranks:
    """A process's place among those that learn together. Light, and travels, until it has joined the others.

    One alone has no process group and hands back what it is given. Otherwise every method is a collective: all ranks
    call the same ones in the same order. RankLost: one of them does not.
    """

    def __init__(self, rank: int = 0, count: int = 1, own_gpu: bool = True, timeout_seconds: float = 600.0) -> None:
        """`own_gpu`: no two ranks compute on the same GPU, which is what NCCL asks for."""
        self.rank = rank
        self.count = count
        self._own_gpu = own_gpu
        self._timeout = timedelta(seconds=timeout_seconds)
        self._device = "cpu"  # where tensors lie that go to the others

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count}"

    def join(self, rendezvous: str, device: str) -> None:
        """Find the others at the address of a `Rendezvous`; NCCL between GPUs, gloo otherwise."""
        host, _, port = rendezvous.rpartition(":")
        backend = "nccl" if device.startswith("cuda") and self._own_gpu else "gloo"
        with self._lost_where_it_fails():
            store = distributed.TCPStore(
                host, int(port), is_master=False, timeout=self._timeout, wait_for_workers=False
            )
            distributed.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.count, timeout=self._timeout
            )
        self._device = device if backend == "nccl" else "cpu"

    def share(self, pairs: list[TransitionIndex]) -> list[TransitionIndex]:
        """This rank's part of an optimizer step's pairs; no collective."""
        return share_of(pairs, self.rank, self.count)

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum every gradient over all ranks, a missing one as 0: the same bits on each."""
        if self.count == 1:
            return
        trained = list(parameters)
        (dtype,) = {parameter.dtype for parameter in trained}
        for gradients in _buckets([_gradient(parameter) for parameter in trained]):
            buffer = self._buffer(gradients)
            assert buffer.dtype == dtype, "gradients have their parameters' dtype"
            with self._lost_where_it_fails():
                distributed.all_reduce(buffer)
            _lay_out(buffer, gradients)

    def send_from(self, rank: int, tensors: Iterable[Tensor]) -> None:
        """Put that rank's values into these tensors of all others."""
        for of_bucket in _buckets(list(tensors)) if self.count > 1 else ():
            buffer = self._buffer(of_bucket)
            with self._lost_where_it_fails():
                distributed.broadcast(buffer, src=rank)
            if rank != self.rank:
                _lay_out(buffer, of_bucket)

    def _buffer(self, tensors: list[Tensor]) -> Float[Tensor, "N"]:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(self._device)

    def total(self, number: float | int) -> float | int:
        """The sum of all ranks' numbers."""
        return self._over_all(number, distributed.ReduceOp.SUM)

    def largest(self, number: float | int) -> float | int:
        """The largest of all ranks' numbers."""
        return self._over_all(number, distributed.ReduceOp.MAX)

    def least(self, number: float | int) -> float | int:
        """The least of all ranks' numbers."""
        return self._over_all(number, distributed.ReduceOp.MIN)

    def _over_all(self, number: float | int, operation: distributed.ReduceOp.RedOpType) -> float | int:
        if self.count == 1:
            return number
        found = torch.tensor(float(number), dtype=torch.float64, device=self._device)
        with self._lost_where_it_fails():
            distributed.all_reduce(found, operation)
            return float(found)  # NCCL's errors come when its result is read

    def gathered(self, values: Float[Tensor, "N"] | Int[Tensor, "N"] | None) -> Float[Tensor, "M"] | None:
        """All ranks' values, one rank's after the other's, as float64 that hold them exactly; None: nobody has any."""
        if self.count == 1:
            return None if values is None else values.double()
        found = torch.empty(0) if values is None else values
        lengths = self._of_each(len(found))
        if not any(lengths):
            return None
        own = torch.zeros(max(lengths), dtype=torch.float64, device=self._device)
        own[: len(found)] = found.to(self._device)
        return torch.cat([every[:length] for every, length in zip(self._rows(own), lengths, strict=True)])

    def check_equal(self, parameters: Iterable[nn.Parameter]) -> None:
        """RuntimeError: the weights of a rank, which it names, are not those of rank 0 to the last bit."""
        if self.count == 1:
            return
        sums = self._of_each(_sum_of_bits(parameters))
        differing = [rank for rank, found in enumerate(sums) if found != sums[0]]
        if differing:
            raise RuntimeError(
                f"the weights of rank {', '.join(map(str, differing))} of {self.count} are not those of rank 0: "
                "a GPU computes wrongly, or ranks are of different kinds"
            )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error of the body on one rank is one on all of them, which would else wait for it in their next collective."""
        failed = True
        try:
            yield
            failed = False
        finally:
            others = self.total(failed)
        if others:
            raise OtherRankFailed("another rank cannot go on, and says itself why")

    def _of_each(self, number: int) -> list[int]:
        own = torch.tensor([number], dtype=torch.int64, device=self._device)
        with self._lost_where_it_fails():
            return torch.cat(self._rows(own)).tolist()

    def _rows(self, own: Tensor) -> list[Tensor]:
        every = [torch.empty_like(own) for _ in range(self.count)]
        with self._lost_where_it_fails():
            distributed.all_gather(every, own)
        return every

    @contextmanager
    def _lost_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of every backend
            raise error_of_collective(self, error) from error


def ranks_of(recipe: Recipe) -> tuple[Ranks, ...]:
    """The ranks of a recipe's learner. Two of them may share a GPU where each asks for half of one or less."""
    count, runtime = recipe.learner.world_size, recipe.runtime
    # Longer than the driver's own limits: it is the driver that finds out who is to blame.
    seconds = runtime.ready_seconds + runtime.watchdog_seconds
    return tuple(Ranks(rank, count, recipe.learner.num_gpus > 0.5, seconds) for rank in range(count))


def buffer_bytes(trained_parameters: int, ranks: int) -> int:
    """What a rank's gradients, or weights, take once more while they travel."""
    return min(4 * trained_parameters, BUCKET_BYTES) if ranks > 1 else 0


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """As many at a time, in their order, as one buffer holds; a larger one alone."""
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
def _lay_out(buffer: Float[Tensor, "N"], tensors: list[Tensor]) -> None:
    """Put the buffer's numbers back into the tensors that it was made of."""
    for tensor, part in zip(tensors, buffer.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@torch.no_grad()
def _sum_of_bits(parameters: Iterable[nn.Parameter]) -> int:
    """Bits added up as integers, whose order does not matter; each parameter's times its place."""
    sums = [parameter.view(BITS[parameter.element_size()]).sum(dtype=torch.int64) for parameter in parameters]
    return int((torch.stack(sums) * torch.arange(1, len(sums) + 1, device=sums[0].device)).sum())

"""Errors of torch.distributed's collectives: a rank is gone, ranks are set up wrongly, or memory ran out."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed

from ray_ddpo.learner.process_group import ProcessGroup, RankLost, Rendezvous, error_of_collective, is_lost_rank
from tests.failure_page import assert_documented

# As torch 2.3 to 2.13 with NCCL 2.14 to 2.28 say it where another process or its machine is gone, or does not answer.
LOST = (
    distributed.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a "
        "network "
        "error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
        "process "
        "exiting prematurely.\nLast error:\nsocketProgressOpt: Call to recv from 10.0.0.2<33759> failed : Connection "
        "reset"
    ),
    distributed.DistBackendError(
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\n"
        "ncclInternalError: Internal check failed.\nLast error:\nNet : Connection closed by remote peer host<50260>"
    ),
    distributed.DistBackendError(
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:219, unhandled system error (run with "
        "NCCL_DEBUG=INFO for "
        "details), NCCL version 2.18.6\nncclSystemError: System call (e.g. socket, malloc) or external library call "
        "failed or "
        "device error.\nLast error:\nsocketStartConnect: Connect to 10.0.0.2<48217> failed : Connection refused"
    ),
    distributed.DistBackendError(
        "NCCL communicator was aborted on rank 0.  Original reason for failure was: [Rank 0] Watchdog caught "
        "collective "
        "operation timeout: WorkNCCL(SeqNum=42, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600410 milliseconds "
        "before "
        "timing out.\nException raised from checkTimeout at ProcessGroupNCCL.cpp:672 (most recent call first):\nframe "
        "#0: …"
    ),
    distributed.DistNetworkError(
        "The client socket has timed out after 600000ms while trying to connect to (10.0.0.1, 4)."
    ),
    distributed.DistStoreError("wait timeout after 600000ms, keys: /1//cpu//0/1"),
    RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:28453"
    ),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
)
SHARED_GPU = distributed.DistBackendError(
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, invalid usage (run with NCCL_DEBUG=WARN "
    "for "
    "details), NCCL version 2.21.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast "
    "error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"
)
# Another rank: sums up 64 MB for ever, and says when it has begun.
OTHER_RANK = """
import sys, torch
from ray_ddpo.learner.process_group import ProcessGroup
ranks = ProcessGroup(1, 2, timeout_seconds=60.0)
ranks.join(sys.argv[1], "cpu")
weights = torch.nn.Parameter(torch.zeros(2**24))
while True:
    ranks.all_reduce_gradients([weights])
    print("summed up", flush=True)
"""


@pytest.fixture
def first_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has made no group yet: torch numbers them, and both ranks must come to the same number."""
    monkeypatch.setattr(distributed.distributed_c10d, "_group_count", 0)


@pytest.mark.parametrize("error", LOST, ids=lambda error: f"{type(error).__name__} {str(error)[-40:]}")
def test_backends_errors_of_a_collective_say_in_one_line_that_ranks_are_lost(error: RuntimeError) -> None:
    found = error_of_collective(ProcessGroup(0, 2), error)
    assert isinstance(found, RankLost) and is_lost_rank(found)
    assert str(found).startswith("rank 0 of 2 has lost the others: ") and "\n" not in str(found)
    assert "frame #" not in str(found) and str(error).split()[-1] in (*str(found).split(), "…")
    assert error_of_collective(ProcessGroup(0, 2), found) is found


def test_errors_outside_of_collectives_are_lost_ranks_if_a_backend_raises_them() -> None:
    assert all(is_lost_rank(error) for error in LOST if isinstance(error, distributed.DistError))
    assert not any(map(is_lost_rank, (RuntimeError("shapes differ"), ValueError("no"), torch.AcceleratorError("no"))))


def test_ranks_on_one_gpu_are_the_users_to_mend_and_missing_memory_stays_what_it_is() -> None:
    found = error_of_collective(ProcessGroup(1, 2), SHARED_GPU)
    assert isinstance(found, ValueError) and "\n" not in str(found)
    assert str(found).startswith("learner.world_size: rank 1 of 2 cannot compute with NCCL: ")
    assert "rank 1 and rank 0 both on CUDA device 1000; give each rank" in str(found)
    situation = "two ranks of the learner have one GPU, though `learner.num_gpus` is above 0.5"
    assert_documented(situation, 2, f"ddpo train: {found}")
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert error_of_collective(ProcessGroup(1, 2), memory) is memory


@pytest.mark.skipif(distributed.is_nccl_available(), reason="this torch has NCCL")
def test_a_torch_without_nccl_is_told_by_the_key_that_asks_for_it(first_group: None) -> None:
    rendezvous = Rendezvous("127.0.0.1")
    with pytest.raises(
        ValueError, match="learner.world_size: rank 0 of 2.*NCCL built in; .* learner.num_gpus to 0.5 or less"
    ):
        ProcessGroup(0, 2).join(rendezvous.address, "cuda")


def test_a_rank_killed_in_the_middle_of_a_collective_is_lost_to_the_other(first_group: None) -> None:
    rendezvous = Rendezvous("127.0.0.1")
    command = [sys.executable, "-c", OTHER_RANK, rendezvous.address]
    other = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
    kill = threading.Timer(0.2, other.kill)
    ranks, weights = ProcessGroup(0, 2, timeout_seconds=60.0), torch.nn.Parameter(torch.zeros(2**24))
    try:
        ranks.join(rendezvous.address, "cpu")
        ranks.all_reduce_gradients([weights])
        kill.start()
        with pytest.raises(RankLost, match="rank 0 of 2 has lost the others: .*peer") as lost:
            while True:
                ranks.all_reduce_gradients([weights])
        assert is_lost_rank(lost.value) and isinstance(lost.value.__cause__, RuntimeError)
    finally:
        kill.cancel()
        other.kill()
        printed, _ = other.communicate(timeout=60)
        distributed.destroy_process_group()
    assert b"summed up" in printed, "it was killed before it had begun"

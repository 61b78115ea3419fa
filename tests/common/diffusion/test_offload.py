"""Offloaded parts: computed on copies, which are dropped without being copied back."""

import pytest
import torch
from torch import Tensor, nn

from ray_ddpo.common.diffusion.offload import on_device


class Shared(nn.Module):
    """An encoder with a buffer, and one weight under two names, as T5's embedding is."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(4, 3)
        self.inner = nn.ModuleList([nn.Embedding(4, 3)])
        self.inner[0].weight = self.shared.weight
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, index: Tensor) -> Tensor:
        return (self.shared(index) + self.inner[0](index)) * self.scale


@pytest.mark.parametrize("fails", [False, True])
def test_parts_compute_on_copies_and_have_the_hosts_tensors_again_afterwards(fails: bool) -> None:
    part, copies = Shared(), []

    def copy(tensor: Tensor, device: str) -> Tensor:
        copies.append(device)
        return tensor.clone()

    tensors = [*part.parameters(), *part.buffers()]
    addresses, weight = [tensor.data_ptr() for tensor in tensors], part.shared.weight.detach().clone()
    expected = part(torch.arange(4))
    try:
        with on_device([part], "another", copy), torch.no_grad():
            assert all(tensor.data_ptr() != before for tensor, before in zip(tensors, addresses, strict=True))
            assert torch.equal(part(torch.arange(4)), expected)
            part.shared.weight.zero_()  # of the copy
            assert not part(torch.arange(4)).any()
            if fails:
                raise RuntimeError("while encoding")
    except RuntimeError:
        assert fails
    assert copies == ["another"] * 2  # each tensor once, and nothing back
    assert [tensor.data_ptr() for tensor in (*part.parameters(), *part.buffers())] == addresses
    assert torch.equal(part.shared.weight, weight) and part.inner[0].weight is part.shared.weight

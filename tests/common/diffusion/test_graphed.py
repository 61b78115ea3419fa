"""A network replayed as CUDA graphs: the outputs and gradients of an eager one to the bit, in any order of calls."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ray_ddpo.common.diffusion import graphed as module
from ray_ddpo.common.diffusion.graphed import GraphedNetwork
from ray_ddpo.common.diffusion.lora.adapters import load_weights, read_weights, reference_policy
from tests.graph_recorder import Counted, OtherBits, Refuses, Rerun
from tests.rounds import moved
from tests.tiny_policy import pair_step, tiny_policy

ROWS = 4


class Small(nn.Module):
    """A network of two layers, one of which is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.trained = nn.Linear(3, 5), nn.Linear(5, 3)
        self.frozen.requires_grad_(False)

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        return self.trained(torch.sin(self.frozen(latents))) * timesteps.unsqueeze(1)


def graphed_and_eager(kind: type[Rerun] = Rerun) -> tuple[GraphedNetwork, Small, Small, Counted]:
    """Return a replayed network, its weights, an eager network of equal weights, and the recorders."""
    network, recorders = Small(), Counted(kind)
    return GraphedNetwork(network, network, recorders), network, copy.deepcopy(network), recorders


def inputs(seed: int, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"latents": torch.randn(rows, 3, generator=generator), "timesteps": torch.full((rows,), float(seed + 1))}


def backward(output: Tensor) -> None:
    output.square().sum().backward()


@torch.no_grad()
def test_replays_take_each_calls_inputs_and_no_replay_changes_an_earlier_output() -> None:
    graphed, _, eager, recorders = graphed_and_eager()
    outputs = [graphed(**inputs(seed)) for seed in range(5)]
    assert recorders.recorded == 1  # at the second call
    assert recorders.replays == 5  # once to compare
    for seed, output in enumerate(outputs):
        assert torch.equal(output, eager(**inputs(seed)))


@torch.no_grad()
def test_weights_that_are_copied_in_are_those_of_the_next_replay() -> None:
    graphed, network, eager, recorders = graphed_and_eager()
    for seed in range(3):
        for each in (network, eager):
            each.trained.weight.copy_(torch.full_like(each.trained.weight, seed))
        assert torch.equal(graphed(**inputs(seed)), eager(**inputs(seed)))
    assert recorders.recorded == 1


@torch.no_grad()
def test_weights_that_move_are_recorded_again() -> None:
    graphed, network, eager, recorders = graphed_and_eager()
    for _ in range(2):
        graphed(**inputs(0))
    network.frozen.weight.data = torch.ones_like(network.frozen.weight)
    eager.frozen.weight.data = torch.ones_like(network.frozen.weight)
    assert torch.equal(graphed(**inputs(0)), eager(**inputs(0)))
    assert recorders.recorded == 2


def test_gradients_accumulate_over_micro_batches_as_in_an_eager_network() -> None:
    graphed, network, eager, recorders = graphed_and_eager()
    for step in range(3):
        for run, of in ((graphed, network), (eager, eager)):
            of.zero_grad(set_to_none=True)
            for seed in range(4):
                backward(run(**inputs(10 * step + seed)))
        for mine, other in zip(network.parameters(), eager.parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, other.grad)
    assert recorders.recorded == 2  # forward and backward
    assert recorders.replays == 2 * 12  # all passes but the first are replayed, and one more is compared


def test_a_second_pass_before_the_firsts_backward_does_not_overwrite_its_activations() -> None:
    graphed, network, eager, recorders = graphed_and_eager()
    for run, of in ((graphed, network), (eager, eager)):
        for _ in range(2):
            backward(run(**inputs(0)))
        of.zero_grad()
        first, second = run(**inputs(1)), run(**inputs(2))
        with torch.no_grad():
            run(**inputs(3))
        backward(first)
        backward(second)
    assert torch.equal(network.trained.weight.grad, eager.trained.weight.grad)
    before = recorders.replays
    backward(graphed(**inputs(4)))
    assert recorders.replays == before + 2


def test_a_pass_whose_output_is_dropped_does_not_stop_replays() -> None:
    graphed, *_, recorders = graphed_and_eager()
    for _ in range(3):
        graphed(**inputs(0))
    before = recorders.replays
    backward(graphed(**inputs(0)))
    assert recorders.replays == before + 2


def test_a_backward_pass_runs_once() -> None:
    graphed, *_ = graphed_and_eager()
    for _ in range(2):
        loss = graphed(**inputs(0)).sum()
        loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="runs once"):
        loss.backward()


def test_passes_without_gradients_are_recorded_apart() -> None:
    graphed, _, eager, recorders = graphed_and_eager()
    for _ in range(2):
        backward(graphed(**inputs(0)))
    with torch.no_grad():
        outputs = [graphed(**inputs(seed)) for seed in range(3)]
    assert all(torch.equal(output, eager(**inputs(seed))) for seed, output in enumerate(outputs))
    assert not any(output.requires_grad for output in outputs)
    assert recorders.recorded == 3


@torch.no_grad()
def test_batches_of_each_size_have_a_recording_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RECORDINGS", 2)
    graphed, _, eager, recorders = graphed_and_eager()
    for rows in (4, 2, 1, 3, 4):
        for seed in range(3):
            assert torch.equal(graphed(**inputs(seed, rows)), eager(**inputs(seed, rows)))
    assert recorders.recorded == 2


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OtherBits, "a replay has other bits than an eager pass"),
        (Refuses, r"recording failed (operation not permitted when stream is capturing)"),
    ],
)
def test_a_network_that_cannot_be_replayed_stays_eager_and_says_so_once(
    kind: type[Rerun], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    graphed, _, eager, recorders = graphed_and_eager(kind)
    for seed in range(4):
        assert torch.equal(graphed(**inputs(seed)), eager(**inputs(seed)))
    expected = f"policy.cuda_graphs: {said}; the network's kernels are launched one by one, with the same bits\n"
    assert capsys.readouterr().err == expected
    assert recorders.replays <= 1
    assert not graphed.holds_memory


def test_a_gradient_of_other_bits_is_found_before_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    class OtherGradients(Rerun):
        def rounded(self, result: Tensor) -> Tensor:
            return result * (1 + 2**-20) if self.recorded == 2 and result.shape != (ROWS, 3) else result

    torch.use_deterministic_algorithms(True)
    try:
        graphed, network, eager, _ = graphed_and_eager(OtherGradients)
        for _ in range(3):
            backward(graphed(**inputs(0)))
            backward(eager(**inputs(0)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert "other bits" in capsys.readouterr().err
    assert torch.equal(network.trained.weight.grad, eager.trained.weight.grad)


@torch.no_grad()
def test_an_overflow_is_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    graphed, *_, recorders = graphed_and_eager()
    for _ in range(3):
        output = graphed(latents=torch.full((ROWS, 3), torch.nan), timesteps=torch.ones(ROWS))
    assert output.isnan().all() and recorders.recorded == 1
    assert capsys.readouterr().err == ""


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("keys", [{}, {"dtype": "bfloat16"}, {"train": "full"}], ids=str)
def test_a_policys_gradients_and_log_probs_keep_their_bits(keys: dict, tiny_model: Path) -> None:
    replayed, eager = (tiny_policy(tiny_model, "learner", **keys) for _ in range(2))
    recorders = Counted()
    replayed.record_graphs(recorders)
    for policy in (replayed, eager):
        for _ in range(3):
            pair_step(policy, 2)()
        load_weights(policy.network, moved(read_weights(policy.network, 0)))
        pair_step(policy, 2)()
    assert recorders.recorded == 2 and recorders.replays == 8
    for mine, other in zip(replayed.network.parameters(), eager.network.parameters(), strict=True):
        assert mine.grad is None or torch.equal(mine.grad, other.grad)


@torch.no_grad()
def test_disabled_and_merged_adapters_have_recordings_of_their_own(tiny_model: Path) -> None:
    replayed, eager = (tiny_policy(tiny_model, merge_adapters=True) for _ in range(2))
    replayed.record_graphs(Counted())
    latents, steps = torch.ones(2, *eager.latent_shape), torch.tensor([0, 1])
    rows = {name: each.expand(2, *each.shape[1:]) for name, each in eager.encode(["a"]).items()}

    def means() -> list[Tensor]:
        found = []
        for policy in (replayed, eager):
            found.append(policy.transition(latents, steps, rows).mean)
        assert torch.equal(*found)
        return found[:1]

    trained = [means() for _ in range(3)]
    for policy in (replayed, eager):
        policy.load_weights(moved(read_weights(policy.network, 0)))
    merged = [means() for _ in range(3)]
    assert not torch.equal(trained[0][0], merged[0][0])


@torch.no_grad()
def test_the_pretrained_network_is_not_replayed_with_adapters(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    policy.record_graphs(Counted())
    latents, steps = torch.ones(2, *policy.latent_shape), torch.tensor([0, 1])
    rows = {name: each.expand(2, *each.shape[1:]) for name, each in policy.encode(["a"]).items()}
    own = [policy.transition(latents, steps, rows).mean for _ in range(3)]
    with reference_policy(policy.network):
        pretrained = [policy.transition(latents, steps, rows).mean for _ in range(3)]
    assert torch.equal(pretrained[0], pretrained[2]) and not torch.equal(own[2], pretrained[2])
    assert torch.equal(policy.transition(latents, steps, rows).mean, own[0])


def test_recordings_give_way_to_a_decoder_that_has_no_memory_left(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tiny_policy(tiny_model)
    policy.record_graphs(Counted())
    decode = policy.vae.decode

    def short_of_memory(*arguments: object, **keys: object) -> object:
        if policy.graphed.holds_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **keys)

    monkeypatch.setattr(policy.vae, "decode", short_of_memory)
    latents = torch.ones(2, *policy.latent_shape)
    expected = policy.decode(latents)
    rows = {name: each.expand(2, *each.shape[1:]) for name, each in policy.encode(["a"]).items()}
    with torch.no_grad():
        for _ in range(2):
            policy.transition(latents, torch.tensor([0, 1]), rows)
    assert policy.graphed.holds_memory
    assert torch.equal(policy.decode(latents), expected)
    assert "memory is needed for decoding" in capsys.readouterr().err
    monkeypatch.setattr(policy.vae, "decode", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        policy.decode(latents)

"""A network whose kernels are recorded as CUDA graphs and then replayed: the same kernels and bits, launched at once."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_ddpo.common.diffusion.lora.adapters import adapted_layers
from ray_ddpo.common.print_line import print_line

MOST_RECORDINGS = 8  # shapes of batches, with and without gradients. Batches of further shapes run eagerly

Work = Callable[[], tuple[Tensor, ...]]


@runtime_checkable
class Recorder(Protocol):
    """A recorder of work on tensors that stay where they are."""

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """Record `work`. Return a function that replays it, and the tensors that each replay writes results into."""
        ...


@final
class CudaRecorder:
    """A recorder of CUDA graphs, which share one memory pool.

    Sharing is safe because `GraphedNetwork` copies a replay's results before another replay begins.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads of a process, such as one that answers health checks, must not spoil a recording.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = work()
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves another stream set
        return graph.replay, results


@final
class GraphedNetwork:
    """A network called through recordings of its kernels, one for each shape of its inputs.

    A shape is recorded at its second call, so that batches that come once cost no recording. Every recording is first
    compared with an eager pass: unless both have the same bits, the network stays eager. So results never depend on
    whether a pass was replayed.

    A recording reads the weights at their addresses, so new weights must be copied into the same tensors, as by
    `load_weights`. If a weight moves, everything is recorded again. Disabled or merged adapters have other recordings.
    """

    def __init__(
        self, call: Callable[..., Tensor], network: nn.Module, make_recorder: Callable[[], Recorder] = CudaRecorder
    ) -> None:
        """Prepare a function of tensors by name that calls `network` and has no other state, and no randomness."""
        self._call = call
        self._tensors = [*network.parameters(), *network.buffers()]
        self._trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._layers = list(adapted_layers(network).values())
        self._make_recorder = make_recorder
        self._stays_eager = False
        self._seen: set[Hashable] = set()
        self._awaited: weakref.ref[_Pass] | None = None  # a replayed pass whose gradients may still be asked for
        self.release()

    def release(self) -> None:
        """Discard all recordings and their memory. They are made again at the next calls."""
        self._recordings: dict[Hashable, _Recording] = {}
        self._recorder = self._make_recorder()
        self._addresses: tuple[int, ...] = ()

    @property
    def holds_memory(self) -> bool:
        """Return whether there are recordings, whose activations stay allocated."""
        return bool(self._recordings)

    def stay_eager(self, why: str) -> None:
        """Discard all recordings, and run eagerly from now on. Print why."""
        self.release()
        self._stays_eager = True
        print_line(f"policy.cuda_graphs: {why}; the network's kernels are launched one by one, with the same bits")

    def __call__(self, **inputs: Tensor) -> Float[Tensor, "B ..."]:
        """Return the network's output."""
        recording = self._recording_of(inputs)
        if recording is None:
            return self._call(**inputs)
        if not recording.parameters:
            return recording.forward(inputs)
        this = _Pass(recording)
        self._awaited = weakref.ref(this)
        return _Replay.apply(this, inputs, *recording.parameters)

    def _recording_of(self, inputs: dict[str, Tensor]) -> "_Recording | None":
        """Return the recording for these inputs, which is made at their second call; None if the pass runs eagerly."""
        if self._stays_eager or self._is_awaited() or any(each.requires_grad for each in inputs.values()):
            return None
        addresses = tuple(map(Tensor.data_ptr, self._tensors))
        if addresses != self._addresses:
            self.release()
            self._addresses = addresses
        adapters = tuple((layer.disable_adapters, layer.merged) for layer in self._layers)
        shapes = tuple((name, each.shape, each.stride(), each.dtype) for name, each in inputs.items())
        key = (torch.is_grad_enabled(), adapters, shapes)
        is_due = key in self._seen and key not in self._recordings and len(self._recordings) < MOST_RECORDINGS
        if is_due and (recording := self._record(inputs)):
            self._recordings[key] = recording
        self._seen.add(key)
        return self._recordings.get(key)

    def _is_awaited(self) -> bool:
        """Return whether a replayed pass waits for its backward pass, whose activations a replay would overwrite."""
        earlier = self._awaited() if self._awaited else None
        return earlier is not None and not earlier.is_done

    def _record(self, inputs: dict[str, Tensor]) -> "_Recording | None":
        """Record these inputs' kernels, and compare a replay with an eager pass; None if the network stays eager."""
        output = self._call(**inputs)
        gradients: list[Tensor | None] = []
        if output.requires_grad:
            gradients = list(torch.autograd.grad(output, self._trained, output.detach(), allow_unused=True))
        reached = [each for each, gradient in zip(self._trained, gradients, strict=False) if gradient is not None]
        eager = [output.detach(), *(gradient for gradient in gradients if gradient is not None)]
        del output
        # torch raises plain RuntimeErrors for what cannot be recorded, and OutOfMemoryError is one too.
        try:
            recording = _Recording(self._call, self._recorder, inputs, reached)
            replayed = [recording.forward(inputs)]
            replayed += recording.backward(replayed[0]) if reached else []
        except RuntimeError as error:
            return self.stay_eager(f"recording failed ({str(error).strip().splitlines()[0]})")
        # Without determinism the kernels of a backward pass round differently from call to call.
        count = len(eager) if torch.are_deterministic_algorithms_enabled() else 1
        if not all(map(_have_same_bits, eager[:count], replayed)):
            return self.stay_eager("a replay has other bits than an eager pass")
        return recording


@final
class _Recording:
    """The kernels of a forward pass on inputs of one shape, and of its backward pass if gradients are enabled."""

    def __init__(
        self,
        call: Callable[..., Tensor],
        recorder: Recorder,
        inputs: dict[str, Tensor],
        parameters: list[nn.Parameter],
    ) -> None:
        """Record the kernels.

        Args:
            parameters: the parameters that gradients reach; none if there is no backward pass.
        """
        self.parameters = parameters
        self._call = call
        self._inputs = {name: torch.empty_like(each).copy_(each) for name, each in inputs.items()}
        self._output: Tensor | None = None  # of the latest run of `_run_forward`, with its autograd graph
        self._replay_forward, (self._result,) = recorder.record(self._run_forward)
        self._output_gradient = torch.zeros_like(self._result)
        if parameters:
            self._replay_backward, self._gradients = recorder.record(self._run_backward)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Replay the forward pass. Return a copy of its output, which the next replay overwrites."""
        for name, each in inputs.items():
            self._inputs[name].copy_(each)
        self._replay_forward()
        return self._result.clone()

    def backward(self, output_gradient: Tensor) -> list[Tensor]:
        """Replay the backward pass of the latest forward pass. Return copies of the parameters' gradients.

        Without copies autograd would take the recording's tensors as `.grad`, and the next replay would overwrite what
        earlier micro-batches have accumulated.
        """
        self._output_gradient.copy_(output_gradient)
        self._replay_backward()
        return [each.clone() for each in self._gradients]

    def _run_forward(self) -> tuple[Tensor]:
        with torch.set_grad_enabled(bool(self.parameters)):
            self._output = self._call(**self._inputs)
        return (self._output.detach(),)

    def _run_backward(self) -> tuple[Tensor, ...]:
        assert self._output is not None, "the forward pass is recorded first"
        return torch.autograd.grad(self._output, self.parameters, self._output_gradient)


@final
class _Pass:
    """A replayed forward pass. It lives as long as a backward pass through it is possible."""

    def __init__(self, recording: _Recording) -> None:
        self.recording = recording
        self.is_done = False


class _Replay(torch.autograd.Function):
    """A replayed forward pass whose backward pass is replayed too."""

    @staticmethod
    def forward(ctx: Any, this: _Pass, inputs: dict[str, Tensor], *_: Tensor) -> Tensor:
        ctx.this = this
        return this.recording.forward(inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        assert not ctx.this.is_done, "the backward pass of a replayed network runs once: its activations are gone"
        ctx.this.is_done = True
        return None, None, *ctx.this.recording.backward(gradients[0])


def _have_same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of equal shape have the same bits. NaN equals itself here."""
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))

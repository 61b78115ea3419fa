"""Time the network alone on one GPU, forward and with its backward pass, to decide which flags pay. Needs no files.

Usage: python -m benchmarks.gpu_network ANSWERS.jsonl [--device cuda] [--tiny] [--seconds 120] [--compile-blocks].

A UNet of SD 1.5's shape with random weights is built on the device. Each answer is appended as soon as it is measured,
the decisive ones first, and no variant is begun after `--seconds`. `--compile-blocks` times the network with compiled
blocks instead.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.random_stable_diffusion import TINY
from benchmarks.step_counts import in_learner, in_sampler, merged, with_peft
from benchmarks.timing import median_seconds, seconds, wait
from ray_ddpo.common.diffusion.families.stable_diffusion import SD1
from ray_ddpo.common.diffusion.graphed import CudaRecorder, GraphedNetwork
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.policy import quiet_libraries
from ray_ddpo.common.recipe.tables import RuntimeTable
from ray_ddpo.common.runtime import settle

REPEATS = 4
# How a bare network gets adapters.
ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda network: network,
    "learner's": in_learner,
    "sampler's": in_sampler,
    "TRL's": with_peft,
    "merged": merged,
}
REPEATED_BLOCKS = {"BasicTransformerBlock", "ResnetBlock2D"}  # each shape is compiled once


@dataclass(frozen=True)
class Variant:
    """One way to run the network."""

    adapters: str = "learner's"  # a name in ADAPTERS
    layout: str = "contiguous"
    deterministic: bool = True
    attention: str = "default"  # or one of torch's backends

    @property
    def name(self) -> str:
        """Return the variant's name in the tables."""
        attention = [] if self.attention == "default" else [f"{self.attention} attention"]
        determinism = "deterministic" if self.deterministic else "not deterministic"
        return ", ".join([f"adapters {self.adapters}", self.layout, determinism, *attention])


SHIPPED = Variant()
# The decisive ones first: time on a GPU may end at any moment.
VARIANTS = (
    SHIPPED,
    replace(SHIPPED, deterministic=False),
    Variant(adapters="TRL's", deterministic=False),
    Variant(adapters="sampler's"),
    replace(SHIPPED, layout="channels_last"),
    replace(SHIPPED, layout="channels_last", deterministic=False),
    replace(SHIPPED, attention="FLASH_ATTENTION", deterministic=False),
    replace(SHIPPED, attention="CUDNN_ATTENTION", deterministic=False),
    Variant(adapters="merged"),
    Variant(adapters="none"),
)


@dataclass(frozen=True)
class Sizes:
    """Rows of a batch: a small and a large sampler's task, and a learner's micro-batch, both with guidance."""

    small: int = 12
    large: int = 32
    learned: int = 16


def network_of(variant: Variant, config: dict[str, Any], device: str) -> Any:
    """Return the network in bfloat16 on the device, with adapters that are not zero."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        network: Any = UNet2DConditionModel.from_config(config)
    layout = torch.channels_last if variant.layout == "channels_last" else torch.contiguous_format
    network = network.to(torch.bfloat16).to(memory_format=layout).eval().requires_grad_(False)
    network = ADAPTERS[variant.adapters](network)
    with torch.no_grad():
        for value in trained_parameters(network).values():
            value.add_(0.02 * torch.randn_like(value))
    return network


def inputs_of(network: Any, rows: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and prompt embeddings."""
    generator = torch.Generator().manual_seed(1)
    side, width = network.config.sample_size, network.config.cross_attention_dim
    latents = torch.randn(rows, 4, side, side, generator=generator).to(device, torch.bfloat16)
    timesteps = torch.randint(0, 1000, (rows,), generator=generator).to(device)
    return latents, timesteps, torch.randn(rows, 77, width, generator=generator).to(device, torch.bfloat16)


@contextmanager
def computing_as(variant: Variant) -> Iterator[None]:
    """Set determinism and attention for the body."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(variant.deterministic)
    pinned = variant.attention != "default"
    try:
        with sdpa_kernel(getattr(SDPBackend, variant.attention)) if pinned else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


class NetworkTimes:
    """A timer for variants of the network, which writes down each answer at once."""

    def __init__(self, answers: Path, device: str, config: dict[str, Any], sizes: Sizes) -> None:
        self._answers, self._device, self._config, self._sizes = answers, device, config, sizes

    def say(self, **found: Any) -> None:
        """Append an answer."""
        with self._answers.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)

    def variant(self, variant: Variant) -> None:
        """Time forward passes of both sizes, and passes with gradients if there are adapters to train."""
        network = network_of(variant, self._config, self._device)
        with computing_as(variant):
            self.say(variant=variant.name, passes="host, one row", rows=1, seconds=self._host_seconds(network))
            for rows in (self._sizes.small, self._sizes.large):
                self._timed(variant.name, "forward", rows, self._forward(network, rows))
            if variant.adapters in ("learner's", "TRL's"):
                self._timed(variant.name, "forward and backward", self._sizes.learned, self._both(network))
            if variant == SHIPPED:
                self._bits(network)
                self._graphs(network)

    def compiled_blocks(self) -> None:
        """Time the network with its repeated blocks compiled, forward first."""
        dynamo: Any = torch._dynamo
        dynamo.config.recompile_limit = 64  # each block has several shapes
        network = network_of(SHIPPED, self._config, self._device)
        for module in network.modules():
            if type(module).__name__ in REPEATED_BLOCKS:
                module.compile(dynamic=False)
        with computing_as(SHIPPED):
            self._timed("blocks compiled", "forward", self._sizes.large, self._forward(network, self._sizes.large))
            self._timed("blocks compiled", "forward and backward", self._sizes.learned, self._both(network))

    def _forward(self, network: Any, rows: int) -> Callable[[], Tensor]:
        inputs = inputs_of(network, rows, self._device)

        @torch.no_grad()
        def work() -> Tensor:
            return network(*inputs, return_dict=False)[0]

        return work

    def _both(self, network: Any) -> Callable[[], None]:
        """Return a forward and backward pass that keeps no gradients."""
        inputs, parameters = inputs_of(network, self._sizes.learned, self._device), trained_parameters(network).values()

        def work() -> None:
            network(*inputs, return_dict=False)[0].float().square().mean().backward()
            for parameter in parameters:
                parameter.grad = None

        return work

    def _timed(self, name: str, passes: str, rows: int, work: Callable[[], object]) -> None:
        """Time a pass and append its seconds and peak memory."""
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = seconds(work)
        taken = median_seconds(work, REPEATS)
        peak = torch.cuda.max_memory_allocated() if self._device == "cuda" else 0
        self.say(variant=name, passes=passes, rows=rows, seconds=taken, first=first, peak=peak)

    def _host_seconds(self, network: Any) -> float:
        """Return the seconds in which the host queues a pass of one row; on a CPU, those of the whole pass."""
        work = self._forward(network, 1)
        work()
        wait()
        started = time.perf_counter()
        work()
        queued = time.perf_counter() - started
        wait()
        return queued

    def _bits(self, network: Any) -> None:
        """Compare the bits of equal rows in batches of two sizes, and with gradients on and off."""
        inputs = inputs_of(network, self._sizes.large, self._device)
        with torch.no_grad():
            whole = network(*inputs, return_dict=False)[0]
            part = network(*(each[: self._sizes.small] for each in inputs), return_dict=False)[0]
        learned = network(*inputs, return_dict=False)[0].detach()
        same_rows = whole[: self._sizes.small]
        self.say(
            bits="batch sizes",
            differing_share=float((same_rows != part).float().mean()),
            relative=float((same_rows.float() - part.float()).norm() / part.float().norm()),
        )
        self.say(bits="gradients on and off", equal=bool(torch.equal(whole, learned)))

    def _graphs(self, network: Any) -> None:
        """Time CUDA graphs of the same kernels, and compare their bits with the eager passes."""
        if self._device != "cuda":
            return

        def call(latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
            return network(latents, timesteps, text, return_dict=False)[0]

        graphed, names = GraphedNetwork(call, network, CudaRecorder), ("latents", "timesteps", "text")

        def inputs(rows: int) -> dict[str, Tensor]:
            return dict(zip(names, inputs_of(network, rows, self._device), strict=True))

        with torch.no_grad():
            for rows in (self._sizes.small, self._sizes.large):
                given = inputs(rows)
                self._timed("CUDA graph", "forward", rows, functools.partial(graphed, **given))
                same = torch.equal(graphed(**given), self._forward(network, rows)())
                self.say(bits=f"CUDA graph of {rows} rows and eager", equal=same, replayed=graphed.holds_memory)
        parameters, given = trained_parameters(network).values(), inputs(self._sizes.learned)

        def both() -> None:
            graphed(**given).float().square().mean().backward()
            for parameter in parameters:
                parameter.grad = None

        self._timed("CUDA graph", "forward and backward", self._sizes.learned, both)
        self.say(bits="CUDA graph with gradients", replayed=graphed.holds_memory)


def main() -> None:
    """Time all variants, then compiled blocks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--compile-blocks", action="store_true")
    given = parser.parse_args()
    quiet_libraries()
    started = time.monotonic()
    device = settle(RuntimeTable(device=given.device, threads=1 if given.device == "cpu" else 8))
    config, sizes = (TINY["unet"], Sizes(2, 4, 2)) if given.tiny else (SD1["unet"], Sizes())
    times = NetworkTimes(given.answers, device, config, sizes)
    if given.compile_blocks:
        return times.compiled_blocks()
    for variant in VARIANTS:
        if time.monotonic() - started > given.seconds:
            print(f"no time is left for: {variant.name}", flush=True)
            continue
        try:
            times.variant(variant)
        except RuntimeError as error:  # a backend that this GPU lacks; the other variants are still useful
            times.say(variant=variant.name, failed=str(error)[:300])


if __name__ == "__main__":
    main()

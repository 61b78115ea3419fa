"""Time the network alone, forward and with its backward pass, in each variant, to find the gain of each optimization.

Usage: python -m benchmarks.gpu_variants RECIPE ANSWERS.jsonl [--override value …]. Each variant appends one line.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import median_seconds, seconds
from ray_ddpo.common.diffusion.lora.adapters import MergedAdapters, trained_parameters
from ray_ddpo.common.diffusion.policy import autocast
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.runtime import settle
from ray_ddpo.deploy.driver.components import Components, components_of

REPEATS = 5
OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Setting = Callable[[Any], Any]  # a policy -> a context in which it is run


@contextmanager
def not_deterministic(policy: Any) -> Iterator[None]:
    """Allow non-deterministic kernels, as `runtime.deterministic = false` does."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


@contextmanager
def kernels_by_trial(policy: Any) -> Iterator[None]:
    """Let cuDNN time its kernels and take the fastest. The choice may differ between processes."""
    torch.backends.cudnn.benchmark = True
    try:
        with not_deterministic(policy):
            yield
    finally:
        torch.backends.cudnn.benchmark = False


@contextmanager
def contiguous(policy: Any) -> Iterator[None]:
    """Use channels-first memory format, torch's default."""
    policy.network.to(memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        policy.network.to(memory_format=torch.channels_last)


@contextmanager
def checkpointed(policy: Any) -> Iterator[None]:
    """Re-compute activations in the backward pass."""
    policy.network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        policy.network.disable_gradient_checkpointing()


@contextmanager
def filled_first(policy: Any) -> Iterator[None]:
    """Fill every new tensor before its first write, as torch does in deterministic mode."""
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = False


def autocast_around(policy: Any) -> Any:
    """Run the network under autocast: norms in float32, and activations twice as wide."""
    return autocast(policy.device, policy.dtype)


def plain(policy: Any) -> Any:
    """Run the network as the recipe says."""
    return nullcontext()


def cudnn_attention(policy: Any) -> Any:
    """Prefer cuDNN's fused attention."""
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *OTHERS], set_priority=True)


def unfused_attention(policy: Any) -> Any:
    """Compute attention with its weight matrix in memory."""
    return sdpa_kernel([SDPBackend.MATH])


FORWARD: dict[str, Setting] = {
    "as it is": plain,
    "new tensors filled first": filled_first,
    "autocast around the network": autocast_around,
    "contiguous": contiguous,
    "attention not fused": unfused_attention,
    "cuDNN's attention": cudnn_attention,
    "not deterministic": not_deterministic,
    "kernels by trial": kernels_by_trial,
}
BACKWARD: dict[str, Setting] = {
    "as it is": plain,
    "new tensors filled first": filled_first,
    "autocast around the network": autocast_around,
    "contiguous": contiguous,
    "cuDNN's attention": cudnn_attention,
    "not deterministic": not_deterministic,
    "kernels by trial": kernels_by_trial,
    "activations computed again": checkpointed,
}


def inputs_of(policy: Any, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return a batch of latents, timesteps and prompt embeddings for the network."""
    steps = torch.randint(0, policy.num_train_timesteps, (rows,), device=policy.device)
    embeds = torch.randn(rows, 77, policy.network.config.cross_attention_dim, device=policy.device)
    return torch.randn(rows, *policy.latent_shape, device=policy.device), steps, {"prompt_embeds": embeds}


class Variants:
    """A timer for variants of one policy, which writes down each result at once."""

    def __init__(self, components: Components, answers: Path) -> None:
        self._components, self._answers = components, answers
        self._device = settle(components.recipe.runtime)

    def policy(self) -> Any:
        return self._components.policy.load(self._device, self._components.recipe.sampling, "learner")

    def forward(self, policy: Any, settings: dict[str, Setting], what: str = "") -> None:
        inputs = inputs_of(policy, 2 * self._components.recipe.sampling.batch_size)

        def work() -> None:
            with torch.no_grad():
                policy._predict(*inputs)

        self._timed("forward", policy, settings, (len(inputs[0]), work), what)

    def backward(self, policy: Any, settings: dict[str, Setting], what: str = "") -> None:
        inputs = inputs_of(policy, 2 * self._components.recipe.learner.micro_batch_size)
        parameters = trained_parameters(policy.network).values()

        def work() -> None:
            policy._predict(*inputs).float().square().mean().backward()
            for parameter in parameters:
                parameter.grad = None

        self._timed("forward and backward", policy, settings, (len(inputs[0]), work), what)

    def _timed(
        self, passes: str, policy: Any, settings: dict[str, Setting], job: tuple[int, Callable[[], None]], what: str
    ) -> None:
        """Time `job` in each setting and append its seconds and peak memory to the answers."""
        rows, work = job
        for name, setting in settings.items():
            if self._device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with setting(policy):
                first = seconds(work)
                taken = median_seconds(work, REPEATS)
            peak = torch.cuda.max_memory_allocated() if self._device == "cuda" else 0
            name = f"{what}, {name}" if what and name != "as it is" else what or name
            found = {"passes": passes, "variant": name, "rows": rows, "seconds": taken, "first": first, "peak": peak}
            with self._answers.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{passes}, {name}: {taken / rows * 1e3:.3f} ms a row, first {first:.1f} s", flush=True)


def main(recipe: str, answers: str, overrides: list[str]) -> None:
    """Time all variants, uncompiled ones first."""
    components = components_of(Recipe.load(recipe, overrides))
    variants = Variants(components, Path(answers))
    policy, merged = variants.policy(), variants.policy()
    MergedAdapters(merged.network).merge()
    variants.forward(policy, FORWARD)
    variants.forward(merged, {"as it is": plain}, "merged")
    variants.backward(policy, BACKWARD)
    # Compiled last: it takes minutes.
    policy.compile(components.recipe.sampling.batch_size)
    variants.forward(policy, {"as it is": plain, "cuDNN's attention": cudnn_attention}, "compiled")
    policy.compile(components.recipe.learner.micro_batch_size)
    variants.backward(policy, {"as it is": plain}, "compiled")
    merged.compile(components.recipe.sampling.batch_size)
    variants.forward(merged, {"as it is": plain}, "merged, compiled")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

"""make step-counts: count kernels, bytes and host waits of a denoising step and a micro-batch, without a GPU."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.host_waits import HostWaits, move_to_meta
from benchmarks.kernel_counts import CLASSES, KernelCounts, counted
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.diffusion.families.stable_diffusion import SD1
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings, adapted_layers, compute_adapters_in
from ray_ddpo.common.diffusion.lora.start import attach, make_trainable
from ray_ddpo.common.diffusion.network_storage import store_in_dtype
from ray_ddpo.common.diffusion.policy import quiet_libraries
from ray_ddpo.common.diffusion.unit_divisors import skip_unit_divisions
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import Task, round_tasks
from ray_ddpo.common.trajectory import TrainBatch, Trajectory
from ray_ddpo.deploy.driver.components import Components, components_of
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.round_data.reference_passes import Update
from ray_ddpo.learner.round_data.step_batches import StepBatches
from ray_ddpo.learner.round_data.transitions import indices_of, round_transitions

FORWARD_ROWS = 32  # a task of 16 images with both branches
LEARNING_ROWS = 16  # a micro-batch of 8 transitions
DTYPE = torch.bfloat16
RECIPE = "deploy/recipes/tiny/jpeg.toml"
PARTS = ("sampler's step", "sampler's task, beside its steps", "learner's micro-batch")


def meta_network(sizes: dict[str, Any] = SD1["unet"]) -> Any:
    """Return a UNet in half precision on the meta device, by default that of SD 1.5."""
    from diffusers import UNet2DConditionModel

    quiet_libraries()
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(sizes).to(DTYPE).eval().requires_grad_(False)


def with_peft(network: Any) -> Any:
    """Add adapters as TRL's trainer has them: in float32, computed by PEFT, without autocast in LoRA runs."""
    settings = LoraSettings()
    attach(network, {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": [*settings.target_modules]})
    for layer in adapted_layers(network).values():
        layer.lora_A.float(), layer.lora_B.float()
    return network


def in_learner(network: Any) -> Any:
    """Add adapters as our learner has them."""
    make_trainable(network, "lora", LoraSettings())
    compute_adapters_in(network, "cuda", DTYPE)
    skip_unit_divisions(network)
    return network


def in_sampler(network: Any) -> Any:
    """Add adapters as our samplers have them."""
    store_in_dtype(in_learner(network), "lora", DTYPE)
    return network


def merged(network: Any) -> Any:
    """Merge the adapters, as with `policy.merge_adapters`."""
    for layer in adapted_layers(in_learner(network)).values():
        layer.merge()
    return network


FORWARD: dict[str, Callable[[Any], Any]] = {
    "bare network": lambda network: network,
    "TRL": with_peft,
    "ours": in_sampler,
    "ours, merged": merged,
}
BACKWARD: dict[str, Callable[[Any], Any]] = {"TRL": with_peft, "ours": in_learner}


def forward_counts(network: Any, rows: int = FORWARD_ROWS) -> KernelCounts:
    """Count a forward pass without gradients."""
    with torch.no_grad():
        return counted(lambda: network(*_inputs(network, rows), return_dict=False))


def backward_counts(network: Any, rows: int = LEARNING_ROWS) -> KernelCounts:
    """Count a forward and a backward pass. Gradients are in memory already, as in all micro-batches but the first."""
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    return counted(lambda: network(*_inputs(network, rows), return_dict=False)[0].sum().backward())


def _inputs(network: Any, rows: int) -> tuple[torch.Tensor, ...]:
    config = network.config
    latents = torch.empty(rows, config.in_channels, config.sample_size, config.sample_size, device="meta", dtype=DTYPE)
    text = torch.empty(rows, 77, config.cross_attention_dim, device="meta", dtype=DTYPE)
    return latents, torch.empty(rows, device="meta", dtype=torch.int64), text


class Waits:
    """Host waits of a real sampler and a real learner, whose policies are moved to the meta device once loaded."""

    def __init__(self, components: Components) -> None:
        """Load both, and sample a task, so that prompts are encoded."""
        recipe = components.recipe
        self._components = components
        self._learner = Learner(components.policy, components.algorithm, recipe)
        self._weights: PolicyWeights = self._learner.weights()[-1]
        self._task: Task = round_tasks(recipe, 0, components.prompts.load())[0]
        self._sampler = Sampler(components.policy, recipe.sampling, recipe.runtime)
        self._trajectory = self._sampled(self._sampler)

    def _sampled(self, sampler: Sampler) -> Trajectory:
        trajectory = sampler.sample(self._task, self._weights)[1]
        assert trajectory is not None
        return trajectory

    def of_task(self, num_steps: int) -> HostWaits:
        """Return the waits of a task of this many steps."""
        recipe = self._components.recipe
        sampling = recipe.sampling.model_copy(update={"num_steps": num_steps})
        sampler = Sampler(self._components.policy, sampling, recipe.runtime)
        self._sampled(sampler)
        move_to_meta(sampler._policy)
        with HostWaits() as waits:
            self._sampled(sampler)
        return waits

    def of_micro_batches(self, count: int) -> HostWaits:
        """Return the waits of an optimizer step of `count` micro-batches, without applying it."""
        learner = self._learner
        size = learner._micro_batch_size
        learner._device = "meta"
        move_to_meta(learner._policy)
        advantages = np.linspace(-1, 1, len(self._trajectory.steps))
        items, batch = round_transitions((self._trajectory,), advantages, "meta"), TrainBatch(0, (), advantages)
        every = indices_of(torch.arange(items.num_images), items.positions(0))
        step = every.repeat(count, 1)[: count * size]
        update = Update(items, [[step]], learner._trained, learner._trained)
        batches = StepBatches(self._components.algorithm, learner._policy, update, size)
        learner._steps.apply = lambda *_: None  # type: ignore[method-assign]
        with HostWaits() as waits:
            learner._optimizer_step(batches, step, batch)
        return waits


def waits_of(recipe: Recipe) -> dict[str, float]:
    """Return the host waits of each part. Those of a step are the growth from two steps to four."""
    waits = Waits(components_of(recipe))
    few, many = (sum(waits.of_task(steps).places.values()) for steps in (2, 4))
    one, three = (sum(waits.of_micro_batches(count).places.values()) for count in (1, 3))
    step = (many - few) / 2
    return dict(zip(PARTS, (step, few - 2 * step, (three - one) / 2), strict=True))


def row(name: str, counts: KernelCounts) -> str:
    """Return a line of the table: kernels and GB of all, then of each class."""
    cells = [f"{counts.total_kernels:,}", f"{counts.total_bytes / 1e9:.1f}"]
    cells += [f"{counts.kernels[kind]:,} / {counts.bytes[kind] / 1e9:.1f}" for kind in CLASSES]
    cells += [f"{counts.transposes} / {counts.transposed_bytes / 1e9:.1f}"]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the tables."""
    bare = meta_network()
    header = f"| | kernels | GB | {' | '.join(CLASSES)} | transposes in conv |\n|{'---|' * (len(CLASSES) + 4)}"
    print(f"SD 1.5 at 512², {DTYPE}, LoRA of rank 4; kernels / GB read and written\n")
    print(f"Forward, {FORWARD_ROWS} rows\n\n{header}")
    for name, make in FORWARD.items():
        print(row(name, forward_counts(make(copy.deepcopy(bare)))), flush=True)
    print(f"\nForward and backward, {LEARNING_ROWS} rows\n\n{header}")
    for name, make in BACKWARD.items():
        print(row(name, backward_counts(make(copy.deepcopy(bare)))), flush=True)
    print("\n| host waits | |\n|---|---|")
    for part, waits in waits_of(Recipe.load(RECIPE)).items():
        print(f"| {part} | {waits:g} |", flush=True)


if __name__ == "__main__":
    main()

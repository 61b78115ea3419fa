"""Low-rank adapters (Hu et al. 2021): load, publish and save them, and disable them for the reference policy."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from pydantic import Field, model_serializer
from torch import Tensor, nn

from ray_ddpo.common.diffusion.lora.files import (
    EXACT_NAME,
    FILE_NAME,
    METADATA,
    NETWORK,
    TRAINED,
    LoraFile,
    read_lora_file,
    save_with_header,
)
from ray_ddpo.common.diffusion.lora.fused import ADAPTER, is_fused
from ray_ddpo.common.model_files.weight_files import stored_name
from ray_ddpo.common.policy_weights import PIECE, PolicyWeights, packed, verified
from ray_ddpo.common.recipe.registry import Component


class LoraSettings(Component):
    """LoRA adapters: by default rank 4 and alpha 4 on the attention's projections, as in ddpo-pytorch."""

    rank: int = Field(default=4, ge=1, le=4096)
    """Rank of the adapters."""
    alpha: int = Field(default=4, ge=1)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the names of the layers that get adapters."""
    path: str | None = Field(default=None, min_length=1)
    """LoRA file or folder that training starts from. Rank, alpha and target modules are then those of the file."""

    @model_serializer(mode="wrap")
    def _without_what_the_file_says(self, handler: Callable[[Any], Any]) -> dict[str, Any]:
        table = handler(self)
        return table if self.path is None else {key: table[key] for key in table if key in self.model_fields_set}


def compute_adapters_in(network: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Let float32 adapters that are not fused compute in the half precision of their layers, by autocast in these only.

    Fused adapters do so themselves. Autocast around the full network would run every norm in float32 and double the
    size of its activations.
    """
    for layer in unfused_layers(network):
        # A cast to float32 would be undone by autocast: the same bits, with two more copies.
        layer.cast_input_dtype_enabled = False
        layer.forward = torch.autocast(device.partition(":")[0], dtype)(layer.forward)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, in the network's own order, which every PolicyWeights has."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def read_weights(network: nn.Module, policy_version: int) -> PolicyWeights:
    """Return a copy of the trained parameters in float32, to be published."""
    parameters = trained_parameters(network)
    shapes = {name: value.shape for name, value in parameters.items()}
    return packed(policy_version, shapes, (value.detach().float().cpu().numpy() for value in parameters.values()))


@torch.no_grad()
def load_weights(network: nn.Module, weights: PolicyWeights) -> int:
    """Load `weights` into the network. Return how many parameters were loaded.

    Raises:
        ValueError: The weights were damaged in transit, or do not match the network's parameter names and shapes.
    """
    parameters = trained_parameters(network)
    expected = tuple((name, tuple(value.shape)) for name, value in parameters.items())
    if expected != tuple(weights.manifest):
        missing = sorted(dict(expected).items() - dict(weights.manifest).items())[:3]
        foreign = sorted(dict(weights.manifest).items() - dict(expected).items())[:3]
        raise ValueError(
            f"weights of version {weights.policy_version} do not fit the network: it lacks {foreign} and still needs "
            f"{missing}"
        )
    for values, piece in in_pieces(verified(weights), list(parameters.values())):
        on_device = as_tensor(piece).to(values[0].device)  # one copy from the host, and copies on the device behind it
        for value, part in zip(values, on_device.split([each.numel() for each in values]), strict=True):
            value.copy_(part.view(value.shape), non_blocking=True)
    return len(parameters)


def in_pieces(
    weights: PolicyWeights, parameters: list[nn.Parameter]
) -> Iterator[tuple[list[nn.Parameter], np.ndarray]]:
    """Yield parameters of one device that lie behind one another in the weights, with their numbers.

    A piece has at most PIECE numbers, or a single larger parameter.
    """
    start, held = 0, 0
    behind: list[nn.Parameter] = []
    for value in parameters:
        if behind and (held + value.numel() > PIECE or value.device != behind[0].device):
            yield behind, weights.buffer[start : start + held]
            behind, start, held = [], start + held, 0
        behind.append(value)
        held += value.numel()
    if behind:
        yield behind, weights.buffer[start:]


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a tensor that shares the array's memory and is only read: the array may be a view of Ray's store."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


@final
class MergedAdapters:
    """Adapters merged into the base weights, so that a forward pass uses these alone.

    Every merge starts from the pretrained weights: merging and unmerging repeatedly would accumulate rounding errors.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = list(adapted_layers(network).values())
        self._pretrained = [layer.get_base_layer().weight.detach().clone() for layer in self._layers]

    def to(self, device: str) -> None:
        """Move the copy of the pretrained weights to another device."""
        self._pretrained = [each.to(device) for each in self._pretrained]

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the adapters as they are now."""
        for layer, pretrained in zip(self._layers, self._pretrained, strict=True):
            layer.get_base_layer().weight.copy_(pretrained)
            layer.merged_adapters.clear()
            layer.merge()


def base_weight_bytes(network: nn.Module) -> int:
    """Return the bytes of the weights that adapters are merged into. `MergedAdapters` keeps a copy of these."""
    return sum(layer.get_base_layer().weight.nbytes for layer in adapted_layers(network).values())


@contextmanager
def reference_policy(network: nn.Module) -> Iterator[None]:
    """Disable the adapters for the duration of the body, which gives the pretrained network without a second copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    trained = trained_parameters(network)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, parameter in network.named_parameters():  # PEFT has made every adapter trainable
            parameter.requires_grad_(name in trained)


def adapted_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers with an adapter by their names in the network."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}


def unfused_layers(network: nn.Module) -> list[Any]:
    """Return the layers whose adapter PEFT computes: convolutions, embeddings, and linear layers that are not plain."""
    return [layer for layer in adapted_layers(network).values() if not is_fused(layer)]


def module_of(name: str) -> str:
    """Return the name of the layer that an adapter's tensor belongs to."""
    return name.partition(".lora_")[0]


def save_lora(network: nn.Module, lora: LoraSettings, folder: Path, part: str = "unet") -> Path:
    """Write the adapter as the file that diffusers' `load_lora_weights` reads. Equal weights give equal bytes.

    alpha / rank is folded into the weights, so that a program that ignores the header applies the same strength.
    If folding rounds the weights, they are also written as trained, into a second file. `part` is the network's name in
    its pipeline.
    """
    from peft import get_peft_model_state_dict

    layers, state = adapted_layers(network), get_peft_model_state_dict(network)
    trained = {stored_name(part, name): value.cpu().contiguous() for name, value in state.items()}
    scales = {stored_name(part, name): float(layer.scaling[ADAPTER]) for name, layer in layers.items()}
    folded = scaled(trained, scales)
    unfolded = scaled(folded, {name: 1 / scale for name, scale in scales.items()})
    targets = sorted(lora.target_modules if lora.path is None else layers)
    ranks = {name: int(layer.r[ADAPTER]) for name, layer in layers.items()}
    alphas = {name: _as_integer(layer.scaling[ADAPTER] * layer.r[ADAPTER]) for name, layer in layers.items()}
    folded_header, trained_header = _header(part, ranks, ranks, targets), _header(part, ranks, alphas, targets)
    kind = type(network).__name__
    folder.mkdir(parents=True, exist_ok=True)
    save_with_header(folded, folder / FILE_NAME, {METADATA: folded_header, TRAINED: trained_header, NETWORK: kind})
    if all(torch.equal(unfolded[name], value) for name, value in trained.items()):
        (folder / EXACT_NAME).unlink(missing_ok=True)
    else:
        headers = {METADATA: trained_header, TRAINED: trained_header, NETWORK: kind}
        save_with_header(trained, folder / EXACT_NAME, headers)
    return folder / FILE_NAME


def scaled(tensors: dict[str, Tensor], scales: dict[str, float]) -> dict[str, Tensor]:
    """Multiply each adapter's second matrix, and its bias, by the layer's factor."""
    return {
        name: value * scales[module_of(name)] if ".lora_B" in name or ".lora_embedding_B" in name else value
        for name, value in tensors.items()
    }


def _header(part: str, ranks: dict[str, int], alphas: dict[str, Any], targets: list[str]) -> str:
    """Return PEFT's settings as diffusers reads them: the most common rank and alpha, and patterns for other layers."""
    settings: dict[str, Any] = {"target_modules": targets}
    for key, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        counted = list(values.values())
        settings[key] = max(sorted(set(counted)), key=counted.count)
        others = {f"^{name}": value for name, value in values.items() if value != settings[key]}
        settings |= {pattern: others} if others else {}
    return json.dumps({f"{part}.{name}": value for name, value in settings.items()}, sort_keys=True)


def _as_integer(alpha: float | int) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def read_lora_settings(path: Path) -> LoraSettings | None:
    """Return rank, alpha and target modules of one of this program's files; `path` alone if they differ between layers.

    If another program wrote the file, return None.
    """
    file = read_lora_file(path)
    if not file.is_ours:
        return None
    settings = file.own_settings
    alpha, is_uniform = settings["lora_alpha"], not (settings.get("rank_pattern") or settings.get("alpha_pattern"))
    if is_uniform and isinstance(alpha, int) and alpha > 0:
        return LoraSettings(rank=settings["r"], alpha=alpha, target_modules=tuple(settings["target_modules"]))
    return LoraSettings(path=str(file.path))


def load_lora(network: nn.Module, path: Path) -> None:
    """Load a LoRA file into the network's own adapter, not as a second. Raise ValueError if the file does not fit."""
    load_lora_file(network, read_lora_file(path))


def load_lora_file(network: nn.Module, file: LoraFile) -> None:
    """Load one of this program's files into the network's own adapter, at the strength that the file gives."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(network).items()}
    given = {name: tuple(value.shape) for name, value in file.named().items()}
    if wanted != given:
        differing = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise ValueError(
            f"the LoRA {file.path} does not fit the network at {differing[:3]} ({len(differing)} of {len(wanted)} "
            "tensors): another model, or another rank"
        )
    scales = {name: file.scale(name) / float(layer.scaling[ADAPTER]) for name, layer in adapted_layers(network).items()}
    set_peft_model_state_dict(network, scaled(file.named(), scales))


def trained_tensors(file: LoraFile) -> dict[str, Tensor]:
    """Return the tensors of one of this program's files as they were trained, without alpha / rank folded in."""
    names = {module: module.removeprefix(f"{file.part}.") for module in map(module_of, file.tensors)}
    scales = {module: file.scale(name) / file.scale(name, trained=True) for module, name in names.items()}
    return scaled(file.tensors, scales)

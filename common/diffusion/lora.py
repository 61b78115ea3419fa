"""Low-rank adapters (Hu et al. 2021): attach, read and load them, switch them off for the pretrained model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from common.diffusion.lora_targets import check_targets
from common.diffusion.weight_files import TRAINED_PARTS, part_of
from common.lora_weights import LoraWeights, packed, verified
from common.reading import reading
from common.registry import Entry

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers looks for rank and alpha


class LoraSettings(Entry):
    """The lineage's adapter: rank 4, alpha 4, on the attention's projections."""

    rank: int = Field(default=4, ge=1, le=4096)
    alpha: int = Field(default=4, ge=1)
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


def make_trainable(network: nn.Module, train: str, lora: LoraSettings) -> None:
    """Leave gradients only where we train: in new float32 adapters ("lora") or everywhere ("full").

    Raises:
        ValueError: one of the adapter's target modules is no layer of the network that an adapter can go into.
    """
    network.requires_grad_(train == "full")
    if train == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        targets = list(lora.target_modules)
        check_targets(network, targets)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights="gaussian")
        inject_adapter_in_model(config, network)  # into any module: it need not be one of diffusers'
    for parameter in trained_parameters(network).values():
        parameter.data = parameter.data.float()


def compute_adapters_in(network: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Let float32 adapters compute in the half precision of the layers beside them, by autocast in these layers alone.

    Autocast around the whole network would have every norm in float32, with its activations written and read twice as wide.
    """
    from peft.tuners.lora import LoraLayer

    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            adapted: Any = layer
            adapted.cast_input_dtype_enabled = (
                False  # else to float32, which autocast takes back: the same bits, two copies
            )
            adapted.forward = torch.autocast(device.partition(":")[0], dtype)(adapted.forward)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, in the network's own order, which is the order in every LoraWeights."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def read_weights(network: nn.Module, policy_version: int) -> LoraWeights:
    """A copy of the trained parameters, to be published."""
    parameters = trained_parameters(network)
    shapes = {name: value.shape for name, value in parameters.items()}
    return packed(policy_version, shapes, (value.detach().cpu().numpy() for value in parameters.values()))


@torch.no_grad()
def load_weights(network: nn.Module, weights: LoraWeights) -> int:
    """Lay `weights` into the network; how many parameters were bound.

    ValueError: the weights were damaged on the way, or do not fit the network name by name and shape by shape.
    """
    parameters = trained_parameters(network)
    expected = tuple((name, tuple(value.shape)) for name, value in parameters.items())
    if expected != tuple(weights.manifest):
        missing = sorted(dict(expected).items() - dict(weights.manifest).items())[:3]
        foreign = sorted(dict(weights.manifest).items() - dict(expected).items())[:3]
        raise ValueError(
            f"weights of version {weights.policy_version} do not fit the network: it lacks {foreign} and still needs {missing}"
        )
    for name, array in verified(weights).arrays().items():
        # A copy: the buffer may be a read-only view of Ray's store, and torch would warn that it is.
        parameters[name].copy_(torch.from_numpy(array.copy()))
    return len(parameters)


@final
class MergedAdapters:
    """Adapters added to the weights beside them, which a forward pass then uses alone.

    Each time from the pretrained weights anew: adding and taking away again would let rounding grow from version to version.
    """

    def __init__(self, network: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        self._layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
        self._pretrained = [layer.get_base_layer().weight.detach().clone() for layer in self._layers]

    def to(self, device: str) -> None:
        """Move the pretrained weights that are kept to another device."""
        self._pretrained = [each.to(device) for each in self._pretrained]

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapters as they are now."""
        for layer, pretrained in zip(self._layers, self._pretrained, strict=True):
            layer.get_base_layer().weight.copy_(pretrained)
            layer.merged_adapters.clear()
            layer.merge()


def base_weight_bytes(network: nn.Module) -> int:
    """What the weights take that adapters are merged into, of which `MergedAdapters` keeps a copy."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
    return sum(layer.get_base_layer().weight.nbytes for layer in layers)


@contextmanager
def reference_policy(network: nn.Module) -> Iterator[None]:
    """The pretrained network, by switching its adapters off: no second copy of it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_lora(network: nn.Module, lora: LoraSettings, folder: Path, part: str = "unet") -> Path:
    """The adapter in the file that diffusers' `load_lora_weights` reads. Equal weights give equal bytes.

    `part`: what the network is called in its pipeline.

    Written here and not by diffusers, whose metadata holds a set and so has another order in each process.
    """
    from peft import get_peft_model_state_dict

    layers = {f"{part}.{name}": value.cpu().contiguous() for name, value in get_peft_model_state_dict(network).items()}
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(lora.target_modules)}
    metadata = json.dumps({f"{part}.{name}": value for name, value in settings.items()}, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(layers, folder / FILE_NAME, {METADATA: metadata})
    return folder / FILE_NAME


def lora_file(path: Path) -> Path:
    """The LoRA file that a run's folder, a LoRA's folder or the file's own path stands for. ValueError: there is none."""
    candidates = (path / "lora" / FILE_NAME, path / FILE_NAME, path)
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise ValueError(f"{path} is no run with a LoRA, no folder with {FILE_NAME}, and no LoRA file")
    return found


def read_lora_settings(path: Path) -> LoraSettings | None:
    """Rank, alpha and target modules as the file has them; None where it says nothing. ValueError: not safetensors."""
    with reading(path), safe_open(path, "pt") as file:
        metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    part = next((part for part in TRAINED_PARTS if f"{part}.r" in metadata), None)
    if part is None:
        return None
    targets = tuple(metadata[f"{part}.target_modules"])
    return LoraSettings(rank=metadata[f"{part}.r"], alpha=metadata[f"{part}.lora_alpha"], target_modules=targets)


def load_lora(network: nn.Module, path: Path) -> None:
    """Lay a LoRA file into the network's own adapter, never beside it.

    ValueError: it is not safetensors, or does not fit name by name.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = lora_file(path)
    with reading(file):
        state = {name.removeprefix(f"{part_of(name)}."): value for name, value in load_file(file).items()}
    wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(network).items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != given:
        differing = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise ValueError(f"the LoRA {path} does not fit the network at {differing[:3]}: another model, or another rank")
    set_peft_model_state_dict(network, state)

"""Make a network trainable: attach new adapters, or those in the LoRA file that `policy.lora.path` names."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ray_ddpo.common.diffusion.lora.adapters import (
    LoraSettings,
    adapted_layers,
    load_lora_file,
    trained_parameters,
)
from ray_ddpo.common.diffusion.lora.diffusers_format import load_any_lora
from ray_ddpo.common.diffusion.lora.files import LoraFile, read_lora_file
from ray_ddpo.common.diffusion.lora.fused import ADAPTER, fuse_adapters
from ray_ddpo.common.model_files.model_hub import first_line
from ray_ddpo.common.model_files.weight_files import TRAINED_PARTS

# Parts of the last block whose output nothing reads, by the network's class: they get no gradients and are not trained.
UNREAD_IN_LAST_BLOCK = {
    "QwenImageTransformer2DModel": ("attn.add_q_proj", "attn.to_add_out", "attn.norm_added_q", "txt_norm2", "txt_mlp"),
}


def make_trainable(network: nn.Module, train: str, lora: LoraSettings) -> None:
    """Enable gradients only for trained parameters, which are float32: the adapters ("lora") or all ("full").

    Adapters are new, or loaded from the file that `lora.path` names. Those of linear layers are fused.

    Raises:
        ValueError: A target module is not a layer that can be adapted, or the file does not fit.
    """
    network.requires_grad_(train == "full")
    if train == "lora" and lora.path is not None:
        start_from_file(network, lora)
    elif train == "lora":
        attach(network, {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.target_modules)})
    for part in UNREAD_IN_LAST_BLOCK.get(type(network).__name__, ()):
        blocks = network.get_submodule("transformer_blocks")
        blocks.get_submodule(f"{len(list(blocks.children())) - 1}.{part}").requires_grad_(False)
    for parameter in trained_parameters(network).values():
        parameter.data = parameter.data.float()
    if train == "lora":
        fuse_adapters(network)


def attach(network: nn.Module, settings: dict[str, Any]) -> None:
    """Add new adapters with PEFT's settings to any module, whether or not it is one of diffusers'."""
    from peft import LoraConfig, inject_adapter_in_model

    check_targets(network, settings["target_modules"])
    inject_adapter_in_model(LoraConfig(**settings, init_lora_weights="gaussian"), network)


def start_from_file(network: nn.Module, lora: LoraSettings) -> None:
    """Add the adapters of the file at `lora.path` to a network, with that file's ranks, alphas and layers.

    Raises:
        ValueError: The file cannot be read, does not fit the network, holds what cannot be trained here, or disagrees
            with a key that is given.
    """
    assert lora.path is not None, "whoever asks for this names a file"
    try:
        file = read_lora_file(Path(os.path.expanduser(lora.path)))
        if file.is_ours:
            attach(network, file.own_settings)
            if not next(network.parameters()).is_meta:
                load_lora_file(network, file)
        else:
            _start_through_diffusers(network, file)
        network.requires_grad_(False)
        for layer in adapted_layers(network).values():
            for name in layer.adapter_layer_names:
                getattr(layer, name).requires_grad_(True)
        _refuse_disagreement(network, lora)
    except (ValueError, FileNotFoundError) as error:
        said = first_line(error) if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"policy.lora.path is {lora.path!r}: {said}") from error


def _start_through_diffusers(network: Any, file: LoraFile) -> None:
    """Load a file of another program into new adapters. Raise ValueError if it holds a DoRA, biases, or nothing."""
    from peft import set_peft_model_state_dict

    unet, transformer = TRAINED_PARTS
    part = unet if "UNet" in type(network).__name__ else transformer
    state = load_any_lora(file, network, part, {}, ADAPTER)
    if not state:
        raise ValueError(f"it holds nothing for {type(network).__name__}")
    if dora := [name for name in state if "lora_magnitude_vector" in name]:
        raise ValueError(f"it is a DoRA, which is not trained here ({len(dora)} magnitudes, such as {dora[0]})")
    if biases := [name for name in state if name.endswith("lora_B.bias")]:
        raise ValueError(
            f"it has biases in its adapters (lora_bias), {len(biases)} in all, such as {biases[0]}: they are not "
            "trained here"
        )
    for layer in adapted_layers(network).values():  # diffusers has rounded the adapters to the network's dtype
        for name in layer.adapter_layer_names:
            getattr(layer, name).float()
    if not next(network.parameters()).is_meta:
        set_peft_model_state_dict(network, state)


def _refuse_disagreement(network: nn.Module, lora: LoraSettings) -> None:
    """Raise ValueError if the recipe gives a rank, alpha or target modules other than the file's."""
    layers = adapted_layers(network)
    found: dict[str, Any] = {
        "rank": sorted({layer.r[ADAPTER] for layer in layers.values()}),
        "alpha": sorted({layer.lora_alpha[ADAPTER] for layer in layers.values()}),
    }
    for key, values in found.items():
        if key in lora.model_fields_set and values != [getattr(lora, key)]:
            raise ValueError(
                f"policy.lora.{key} is {getattr(lora, key)}, and the file has {', '.join(map(str, values))}: leave "
                "the key out"
            )
    if "target_modules" in lora.model_fields_set:
        ends = tuple(f".{target}" for target in lora.target_modules)
        outside = [name for name in layers if not f".{name}".endswith(ends)]
        unused = [target for target in lora.target_modules if not any(f".{n}".endswith(f".{target}") for n in layers)]
        if outside or unused:
            raise ValueError(
                f"policy.lora.target_modules is {list(lora.target_modules)}, and the file has other layers, such as "
                f"{(outside or unused)[0]}: leave the key out"
            )


ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what PEFT adapts layer by layer
MOST_LISTED = 12  # names in an error; a large network has hundreds of layers


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Raise ValueError if a target module names no layer of the network, or a layer that cannot be adapted.

    PEFT ignores names that it does not find: a misspelt name among several would silently leave its layers untrained.
    """
    said, layers = f"policy.lora.target_modules is {list(targets)}", dict(_adaptable(network))
    if not layers:
        raise ValueError(
            f"{said}: {type(network).__name__} has no Linear, Conv or Embedding layer that an adapter could go into; "
            'give policy.train = "full"'
        )
    modules = {name: module for name, module in network.named_modules() if name}
    found = {target: [name for name in modules if f".{name}".endswith(f".{target}")] for target in targets}
    if unknown := [target for target in targets if not found[target]]:
        raise ValueError(f"{said}: the network has no module called {unknown}; its layers are {_shortened(layers)}")
    for name in (name for names in found.values() for name in names if name not in layers):
        kind = type(modules[name]).__name__
        raise ValueError(
            f"{said}: {name} is a {kind}, which an adapter cannot go into; it must name layers among "
            f"{_shortened(layers)}"
        )


def _adaptable(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in network.named_modules():
        parent = network.get_submodule(name.rpartition(".")[0])
        # torch's attention reads its output layer's weight and never calls the layer: an adapter there has no effect.
        if isinstance(module, ADAPTABLE) and not isinstance(parent, nn.MultiheadAttention):
            yield name, module


def _shortened(layers: dict[str, nn.Module]) -> str:
    """List the layers' last names, each once, up to MOST_LISTED. A layer in a list is named with its parent."""
    parts = [name.split(".") for name in layers]
    own = list(dict.fromkeys(".".join(part[-2:] if part[-1].isdigit() else part[-1:]) for part in parts))
    more = f" and {len(own) - MOST_LISTED} more" if len(own) > MOST_LISTED else ""
    return ", ".join(own[:MOST_LISTED]) + more

"""Check that a LoRA's target modules are layers of the network that can be adapted."""

from collections.abc import Iterator, Sequence

from torch import nn

ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what PEFT adapts layer by layer
MOST_LISTED = 12  # names in an error; a large network has hundreds of layers


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Refuse target modules that name no layer of the network, or a layer that cannot be adapted.

    PEFT ignores names that it does not find: a misspelt name among several would silently leave its layers untrained.

    Raises:
        ValueError: A target names no such layer, or the network has none.
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
            f"{said}: {name} is a {kind}, which an adapter cannot go into; it must name layers among {_shortened(layers)}"
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

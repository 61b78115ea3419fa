"""Load other programs' LoRA files through diffusers, and refuse what diffusers would ignore; `adapters.py` writes ours."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ray_ddpo.common.diffusion.lora.files import (
    METADATA,
    PEFT_CONFIG,
    PEFT_NAME,
    SECOND_NAME,
    LoraFile,
    read_lora_file,
    refuse_settings,
    save_with_header,
)
from ray_ddpo.common.model_files.weight_files import SECOND_PART
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.reading import reading

# What diffusers and PEFT raise on files in another format.
NOT_READ = (ValueError, LookupError, TypeError, AttributeError, NotImplementedError, AssertionError, RuntimeError)
PEFT_PREFIX = "base_model.model."  # prefix of each name in PEFT's files
KINDS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
FIRST = "default_0"  # diffusers' name for the first adapter
LONGEST_REASON = 300  # characters of a library's message, which may list every name


@dataclass(frozen=True)
class _Converted:
    """A LoRA with diffusers' names, and its alphas and settings."""

    state: dict[str, Tensor]
    alphas: dict[str, float] | None
    metadata: dict[str, Any] | None

    def of(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of one part by their names in it."""
        return {
            name.removeprefix(f"{part}."): value for name, value in self.state.items() if name.startswith(f"{part}.")
        }


LOADERS = {  # the network's class → diffusers' loader of LoRA files for its pipelines
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
    "Lumina2Transformer2DModel": "Lumina2LoraLoaderMixin",
    "SanaTransformer2DModel": "SanaLoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
    "LTXVideoTransformer3DModel": "LTXVideoLoraLoaderMixin",
}


class _TracedTensor(Tensor):
    """A tensor that records which of a file's tensors it was made from."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        sources = frozenset[str]().union(*(each.sources for each in _traced_in((args, kwargs))))
        for each in _traced_in(result):
            each.sources = sources
        return result


def _traced_in(values: Any) -> Iterator[_TracedTensor]:
    return (each for each in tree_leaves(values) if isinstance(each, _TracedTensor))


def load_any_lora(
    file: LoraFile, network: Any, part: str, beside: Mapping[str, nn.Module], adapter: str | None = None
) -> dict[str, Tensor]:
    """Load a LoRA through diffusers into a network and text encoders. Return the network's tensors by PEFT's names.

    Args:
        file: in any format that diffusers reads, or PEFT's.
        network: the pipeline's UNet or transformer.
        part: the network's name in its pipeline.
        beside: the text encoders that the LoRA may adapt too, by their names in the pipeline.
        adapter: the new adapter's name; if None, diffusers' name for the first adapter.

    Raises:
        ValueError: The file has another format, or some tensors fit nowhere, which diffusers would ignore.
    """
    loader = _loader(network)
    if loader is None:
        raise ValueError(
            f"the LoRA {file.path} was not written by this program, and {type(network).__name__} is no network whose "
            "LoRA files diffusers reads"
        )
    converted = _converted(file, loader, network, part)
    _refuse_other_parts(file, converted, (part, *beside))
    for name in (part, *beside):
        if converted.of(name):
            refuse_settings(file.path, converted.metadata or {}, name)
    modules: dict[str, Any] = {part: network, **beside}
    states = {name: _of_encoder(converted.of(name), encoder) for name, encoder in beside.items()}
    states = {part: _of_network(converted.of(part)), **states}
    for name, state in states.items():
        _refuse_what_does_not_fit(file, modules[name], name, state)
    given: dict[str, Any] = {"network_alphas": converted.alphas, "metadata": converted.metadata}
    given |= {"adapter_name": adapter or FIRST, "low_cpu_mem_usage": True}  # as diffusers' pipelines do
    with _refusing(file, f"diffusers cannot load it into {type(network).__name__}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # mismatches are refused or reported below
        if states[part]:
            network.load_lora_adapter(converted.state, prefix=part, **given)
        for name, encoder in beside.items():
            if states[name]:
                loader.load_lora_into_text_encoder(converted.state, text_encoder=encoder, prefix=name, **given)
    _report_alphas(file, network, converted, part)
    for name, state in states.items():
        _refuse_what_did_not_arrive(file, modules[name], state, adapter or FIRST)
    return states[part]


def loadable_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """Return a pipeline's text encoders that diffusers loads LoRAs into."""
    parts = getattr(pipeline, "_lora_loadable_modules", ())  # a pipeline that takes no LoRAs has none
    names = [name for name in parts if name.startswith("text_encoder")]
    return {name: encoder for name in names if (encoder := getattr(pipeline, name, None)) is not None}


def _loader(network: Any) -> Any:
    """Return diffusers' loader class for pipelines with such a network; None if there is none."""
    from diffusers.loaders import lora_pipeline as loaders

    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        of_xl = network.config.get("addition_embed_type") == "text_time"
        return loaders.StableDiffusionXLLoraLoaderMixin if of_xl else loaders.StableDiffusionLoraLoaderMixin
    return getattr(loaders, LOADERS[kind]) if kind in LOADERS else None


def _converted(file: LoraFile, loader: Any, network: Any, part: str) -> _Converted:
    """Convert a file's names to diffusers'. Raise ValueError if diffusers cannot read the file, or ignores a tensor."""
    if (file.path.parent / PEFT_CONFIG).is_file() and all(name.startswith(PEFT_PREFIX) for name in file.tensors):
        return _of_peft(file, part)
    tensors: dict[str, Any] = {}
    for name, value in file.tensors.items():
        tensors[name] = value.as_subclass(_TracedTensor)
        tensors[name].sources = frozenset((name,))
    reader = loader.__name__
    keys = {"unet_config": network.config} if "XL" in reader else {}
    keys |= {"return_alphas": True} if "Flux" in reader else {}
    with _refusing(file, f"diffusers cannot read it for {type(network).__name__}"):
        state, *alphas, _ = loader.lora_state_dict(tensors, return_lora_metadata=True, **keys)
    _refuse_what_is_left_out(file, state)
    strengths = {
        name: float(value) if isinstance(value, Tensor) else value
        for name, value in ((alphas[0] if alphas else None) or {}).items()
    }
    plain = {name: value.as_subclass(Tensor) for name, value in state.items()}
    return _Converted(plain, strengths or None, file.metadata or None)


def _of_peft(file: LoraFile, part: str) -> _Converted:
    """Read a file and its configuration as PEFT's `save_pretrained` writes them, for the network only."""
    from peft import LoraConfig

    path = file.path.parent / PEFT_CONFIG
    with reading(path):
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} has peft_type {kind!r}: only LORA can be read")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"{path} has init_lora_weights {start!r}, which changes the network's own weights: save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion, which converts the adapter to a plain LoRA"
        )
    known = {field.name for field in fields(LoraConfig)} | {"peft_version"}
    unknown = sorted(name for name in settings.keys() - known if settings[name] not in (None, False))
    if unknown:
        raise ValueError(f"{path} has settings that the installed peft does not know: {unknown[:3]}")
    metadata = {f"{part}.{name}": value for name, value in settings.items() if name in known - {"peft_version"}}
    state = {f"{part}.{name.removeprefix(PEFT_PREFIX)}": value for name, value in file.tensors.items()}
    return _Converted(state, None, metadata)


def save_for_peft(path: Path) -> None:
    """Write one of this program's files again beside itself, as PEFT's `PeftModel.from_pretrained` reads it."""
    file = read_lora_file(path)
    settings = {name.removeprefix(f"{file.part}."): value for name, value in file.metadata.items()}
    text = json.dumps({"peft_type": "LORA", **settings}, indent=2, sort_keys=True)
    (path.parent / PEFT_CONFIG).write_text(text, encoding="utf-8")
    save_file({f"{PEFT_PREFIX}{name}": value for name, value in file.named().items()}, path.parent / PEFT_NAME)


def save_for_second_network(path: Path) -> None:
    """Write the second network's adapters in one of this program's files beside it.

    They have the first network's prefix there, under which diffusers loads adapters into either network.
    """
    file = read_lora_file(path)
    of_second = {name for name in file.tensors if name.startswith(f"{SECOND_PART}.")}
    renamed = {f"{file.part}{name.removeprefix(SECOND_PART)}": file.tensors[name] for name in of_second}
    header = {METADATA: json.dumps(file.metadata, sort_keys=True)}
    save_with_header(renamed, path.parent / SECOND_NAME, header)


@contextmanager
def _refusing(file: LoraFile, what: str) -> Iterator[None]:
    """Raise ValueError with the file's name if a library raises."""
    from diffusers.utils import logging as of_diffusers

    verbosity = of_diffusers.get_verbosity()
    of_diffusers.set_verbosity(of_diffusers.CRITICAL)  # diffusers prints errors before it raises them
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except NOT_READ as error:
        flat = " ".join(str(error).split())
        short = flat if len(flat) <= LONGEST_REASON else f"{flat[:LONGEST_REASON]}…"
        raise ValueError(f"the LoRA {file.path} does not fit: {what} ({type(error).__name__}: {short})") from error
    finally:
        of_diffusers.set_verbosity(verbosity)


def _refuse_what_is_left_out(file: LoraFile, state: Mapping[str, Any]) -> None:
    """Raise ValueError if diffusers' conversion has dropped a tensor that has an effect."""
    used = frozenset[str]().union(*(each.sources for each in _traced_in(dict(state))))
    modules = {name.split(".lora")[0].split("_lora.")[0] for name in used}
    unused = {name: value for name, value in file.tensors.items() if name not in used}
    alphas = [name for name in unused if name.endswith(".alpha")]
    of_used = {name for name in alphas if name.removesuffix(".alpha") in modules}
    if ignored := [name for name in unused if name not in of_used and (name in alphas or unused[name].float().any())]:
        raise ValueError(_misfit(file, ignored, "would be ignored by diffusers"))


def _refuse_other_parts(file: LoraFile, converted: _Converted, parts: tuple[str, ...]) -> None:
    """Raise ValueError if tensors belong to parts of the pipeline that are not loaded."""
    if others := [name for name in converted.state if name.partition(".")[0] not in parts]:
        for_text = len(parts) == 1 and all(name.startswith("text_encoder") for name in others)
        where = "text encoders, which are not trained here" if for_text else f"none of {', '.join(parts)}"
        raise ValueError(_misfit(file, others, f"belong to {where}"))


def _refuse_what_does_not_fit(file: LoraFile, module: nn.Module, part: str, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor's layer does not exist, or has another shape."""
    layers: dict[str, Any] = {name: getattr(layer, "weight", None) for name, layer in module.named_modules()}
    wrong = []
    for name, value in state.items():
        layer, _, kind = name.partition(".lora_")
        weight = layers.get(layer)
        kind = f"lora_{kind}".removesuffix(".weight") if "magnitude" in kind else f"lora_{kind}"
        paired = {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"} <= state.keys()
        if kind not in KINDS or not paired or weight is None:
            fits = False
        elif kind == "lora_A.weight":
            fits = value.shape[1:] == weight.shape[1:]
        else:
            fits = value.shape[0] == weight.shape[0] or "magnitude" in kind
        if not fits:
            wrong.append(f"{part}.{name}")
    if wrong:
        raise ValueError(_misfit(file, wrong, f"have no layer of that name and shape in {type(module).__name__}"))


def _refuse_what_did_not_arrive(file: LoraFile, module: Any, state: Mapping[str, Tensor], adapter: str) -> None:
    """Raise ValueError if the module's adapter has other tensors than the file."""
    from peft import get_peft_model_state_dict

    if not state:
        return
    arrived = {_plain(name) for name in get_peft_model_state_dict(module, adapter_name=adapter)}
    given = {_plain(name) for name in state}
    if arrived != given:
        raise ValueError(_misfit(file, sorted(arrived ^ given), f"are not those that {type(module).__name__} has now"))


def _report_alphas(file: LoraFile, network: nn.Module, converted: _Converted, part: str) -> None:
    """Print that diffusers gives all layers one alpha although the file has several."""
    given = {value for name, value in (converted.alphas or {}).items() if name.startswith(f"{part}.")}
    layers: list[Any] = [each for each in network.modules() if isinstance(getattr(each, "lora_alpha", None), dict)]
    applied = {float(alpha) for layer in layers for alpha in layer.lora_alpha.values()}
    if len(given) > 1 and applied != given:
        print_line(
            f"the LoRA {file.path} has an alpha of {' and '.join(f'{each:g}' for each in sorted(given))} on different "
            f"layers, of which diffusers applies {' and '.join(f'{each:g}' for each in sorted(applied))} to all"
        )


def _plain(name: str) -> str:
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def _of_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a UNet's or transformer's tensors by PEFT's names, as diffusers converts them."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    first = next(iter(state), "lora_A")
    return state if "lora_A" in first else convert_unet_state_dict_to_peft(state)


def _of_encoder(state: dict[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """Return a text encoder's tensors by PEFT's names, as diffusers converts them."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    if not state:
        return state
    found = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    return (
        found if hasattr(encoder, "text_model") else {name.removeprefix("text_model."): v for name, v in found.items()}
    )


def _misfit(file: LoraFile, names: list[str], why: str) -> str:
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return f"the LoRA {file.path} does not fit: {len(names)} of its {len(file.tensors)} tensors {why}: {shown}"

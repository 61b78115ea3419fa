"""The sizes of a diffusers model, from its configuration files. Nothing is loaded."""

import copy
import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ray_ddpo.common.diffusion.loading.model_index import INDEX, about_model, read_object, text_tower
from ray_ddpo.common.diffusion.memory.meta_device import library_bytes
from ray_ddpo.common.diffusion.memory.network_memory import Inputs, count_network
from ray_ddpo.common.diffusion.memory.network_work import decoder_work
from ray_ddpo.common.diffusion.memory.repeated_operations import RepeatedOperations
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind, PolicySizes, parameter_bytes
from ray_ddpo.common.diffusion.policy import quiet_libraries
from ray_ddpo.common.model_files.model_hub import file_from_hub
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import DTYPES

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig

Configs = dict[str, dict[str, Any]]  # part name → its configuration
_counted: dict[tuple[str, int, str], PolicySizes] = {}  # by model, branches and device


def read_config(model: str, folder: Path, published: dict[str, Configs], part: str) -> dict[str, Any]:
    """Return one part's configuration, from a folder, from the architectures known here, or from the hub.

    The part "model_index" is the model's own index.
    """
    name = INDEX if part == "model_index" else f"{part}/config.json"
    if folder.is_dir():
        with about_model(model):
            found = read_object(folder / name)
        return text_tower(found)
    if model in published:
        return published[model][part]
    file = file_from_hub(model, name, f"policy.model is {model!r}, whose {name} is needed")
    return json.loads(Path(file).read_text())


def model_sizes(
    config: "DiffusersConfig", configs: Configs, model: str, sampling: SamplingTable, device: DeviceKind
) -> PolicySizes:
    """Build every part on the meta device and count. `configs` has one configuration per part.

    `model` is the class with its keys and configurations, as text: what was counted for it before is returned again.
    """
    # Guidance scale and number of steps do not change a step's memory, so count once and cache.
    key = (model, config.branches(sampling), device)
    if key not in _counted:
        alike = SamplingTable(guidance_scale=2.0 if config.branches(sampling) == 2 else 0.0)
        with RepeatedOperations():
            _counted[key] = _count(config, copy.deepcopy(configs), alike, device)
    sizes = _counted[key]
    trajectory = (sampling.num_steps + 1) * math.prod(sizes.latent_shape)  # elements per image
    stored = DTYPES[sampling.latents_dtype].itemsize
    return replace(
        sizes,
        stochastic_steps=config.stochastic_steps(sampling),
        sampling=sizes.sampling.plus(0, trajectory * (4 + 2 * stored)),  # noise, latents step by step, and stacked
        decoding=sizes.decoding.plus(0, trajectory * stored),
    )


def _count(config: "DiffusersConfig", configs: Configs, sampling: SamplingTable, device: DeviceKind) -> PolicySizes:
    """Count parameters and predict peak memory of every kind of work."""
    quiet_libraries()
    parts = meta_parts(config, configs)
    for part in parts.values():
        part.to(config.loaded_dtype)
    network, vae = parts.pop(config.network_name), parts.pop("vae")
    config.set_up_decoder(vae.requires_grad_(False))
    decode = functools.partial(config.decoded, vae)
    shapes, latent_shape = config.conditioning_shapes(configs), config.latent_shape(dict(network.config))
    inputs = Inputs(config.network_call(sampling), latent_shape, shapes, config.branches(sampling))
    counts = count_network(config, network, inputs, device, of_diffusers=True)
    frozen = len(config.frozen_parts) * counts.parameters * config.dtype_of("sampler").itemsize
    held = counts.network_bytes + frozen + library_bytes(device)
    encoders, decoder = sum(parameter_bytes(part) for part in parts.values()), parameter_bytes(vae)
    offloaded = config.offload and device == "cuda"
    decoding = counts.sampler.decoding(decode, vae.dtype, config.has_frames)
    text_bytes = sum(math.prod(shape) for shape in shapes.values()) * config.loaded_dtype.itemsize
    return PolicySizes(
        latent_shape=latent_shape,
        stochastic_steps=config.stochastic_steps(sampling),
        conditioning_shape=config.with_negative(shapes),
        conditioning_bytes=text_bytes,
        network_parameters=counts.parameters,
        trained_parameters=counts.trained,
        learner=counts.learner,
        sampling=counts.sampler.sampling().plus(held + (0 if offloaded else encoders + decoder)),
        decoding=decoding.plus(held + decoder + (0 if offloaded else encoders)),
        encoding_bytes=held + encoders + (0 if offloaded else decoder),
        network_bytes=counts.network_bytes,
        work=counts.work and replace(counts.work, decoding=decoder_work(decode, vae.dtype, latent_shape)),
        units=counts.units,
        decoding_gradient=counts.sampler.decoding_gradient(decode, vae.dtype),
        decoder_bytes=decoder,
    )


def meta_parts(config: "DiffusersConfig", configs: Configs) -> dict[str, Any]:
    """Return a pipeline's networks on the meta device, by diffusers' part names."""
    import diffusers
    import transformers

    with torch.device("meta"):
        network_class: Any = getattr(diffusers, config.network_class)
        parts = {
            config.network_name: network_class.from_config(configs[config.network_name]),
            "vae": getattr(diffusers, configs["vae"].get("_class_name", "AutoencoderKL")).from_config(configs["vae"]),
        }
        others = [network_class.from_config(configs[config.network_name]) for _ in config.joined_parts]
        config.join_networks(parts[config.network_name], others)
        config.set_up_network(parts[config.network_name])
        for part, (config_class, model_class) in config.text_parts.items():
            text_config = getattr(transformers, config_class)(**configs[part])
            parts[part] = getattr(transformers, model_class)(text_config)
    return parts

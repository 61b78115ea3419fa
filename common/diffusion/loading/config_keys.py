"""Check the configuration keys of a model's parts before anything is computed from them.

Networks, decoders and text encoders are the libraries' own modules, so a key of theirs takes effect by itself. Left are the
keys that diffusers' pipeline reads beside them, and those that must agree between two parts. Each is honoured as there, or
refused with part, key and value.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_ddpo.common.diffusion.loading.model_index import read_object
from ray_ddpo.common.diffusion.number_keys import decoder_number_faults, sample_size_faults
from ray_ddpo.common.diffusion.schedulers.conversion import as_loaded, check_scheduler
from ray_ddpo.common.recipe.tables import SamplingTable

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig

Components = Mapping[str, Mapping[str, Any]]  # by the part's name, its keys; model_index.json's under INDEX
INDEX = "model_index"
FILES = {INDEX: "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
FLOW_PIPELINES = ("StableDiffusion3Pipeline", "FluxPipeline")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", *FLOW_PIPELINES)  # whose keys are known here
SQUARE = 4  # latents that FLUX packs into a token
DEFAULTS: dict[str, dict[str, Any]] = {  # of the libraries, where a file has no such key
    "unet": {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280},
    "vae": {"latent_channels": 4, "out_channels": 3},
    "text_encoder": {"hidden_size": 512, "projection_dim": 512, "max_position_embeddings": 77, "d_model": 512},
    "StableDiffusion3Pipeline": {
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
    },
    "FluxPipeline": {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "patch_size": 1},
}


class Rule(NamedTuple):
    """One key of one part: the values that are honoured, and why no other is."""

    part: str
    key: str
    allowed: tuple[Any, ...]
    reason: str


LABELS = "the pipeline tells its network no class labels"
IMAGES = "the pipeline gives its network nothing but text"
TOLD = "a network that was distilled to be told the guidance is sampled by another method"
UNET = (
    Rule("unet", "class_embed_type", (None,), LABELS),
    Rule("unet", "num_class_embeds", (None,), LABELS),
    Rule("unet", "time_cond_proj_dim", (None,), TOLD),
    Rule("unet", "encoder_hid_dim_type", (None, "text_proj"), IMAGES),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "StableDiffusionPipeline": (*UNET, Rule("unet", "addition_embed_type", (None, "text"), IMAGES)),
    "StableDiffusionXLPipeline": (
        *UNET,
        Rule(
            "unet", "addition_embed_type", ("text_time",), "an SDXL tells its network the image's size and pooled text"
        ),
        Rule(INDEX, "add_watermarker", (None, False), "images are not watermarked here; set it to false"),
    ),
}


def check_keys(config: "DiffusersConfig", pipeline: Any = None) -> None:
    """Check a model's configuration: that of a loaded pipeline, else the files of its folder, where it is one.

    Raises:
        ValueError: a key has a value that cannot be honoured as diffusers honours it, or two parts do not fit together.
    """
    if config.pipeline_class not in PIPELINES:  # a family of the user's own knows its keys itself
        return
    parts = _loaded(pipeline) if pipeline is not None else configuration_files(config)
    try:
        for fault in _faults(config, parts):
            raise ValueError(fault)
        if pipeline is None and "scheduler" in parts:
            check_scheduler(parts[INDEX], parts["scheduler"], config.pipeline_class in FLOW_PIPELINES)
    except ValueError as error:
        raise ValueError(f"policy.model is {config.model!r}: {error}") from None


def check_steps(config: "DiffusersConfig", sampling: SamplingTable) -> None:
    """Raise ValueError if the schedule in a UNet's folder has no such steps, as far as files tell."""
    parts = configuration_files(config)
    if config.pipeline_class in PIPELINES and config.pipeline_class not in FLOW_PIPELINES and "scheduler" in parts:
        from ray_ddpo.common.diffusion.schedulers.ddim import ddim_table

        ddim_table(as_loaded(parts[INDEX], parts["scheduler"])[0], sampling.num_steps, sampling.eta, "cpu")


def text_tokens(config: "DiffusersConfig", text: Mapping[str, Any]) -> int:
    """Return how many tokens a CLIP is given: its tokenizer says so in a folder, else as many as it has positions for."""
    length = _read(config.folder() / "tokenizer" / "tokenizer_config.json").get("model_max_length")
    return length or text.get("max_position_embeddings", DEFAULTS["text_encoder"]["max_position_embeddings"])


def configuration_files(config: "DiffusersConfig") -> Components:
    """Return the keys of each part's configuration file in a model's folder; empty if the model is in no folder."""
    folder = config.folder()
    if not folder.is_dir():
        return {}
    places = {name: FILES.get(name, f"{name}/config.json") for name in (INDEX, "scheduler", "vae", config.network_name)}
    places |= {name: f"{name}/config.json" for name in config.text_parts}
    places |= {name: f"{name}/tokenizer_config.json" for name in config.tokenizers}
    read = {name: _read(folder / place) for name, place in places.items()}
    for name in config.text_parts:  # of a whole CLIP the text tower is taken
        read[name] = read[name].get("text_config") or read[name]
    return {name: keys for name, keys in read.items() if keys}


def _read(path: Path) -> dict[str, Any]:
    """Return the keys of a file; none where it is not there, which those who load it will say."""
    return read_object(path) if path.is_file() else {}


def _loaded(pipeline: Any) -> Components:
    parts: dict[str, Mapping[str, Any]] = {INDEX: dict(pipeline.config)}
    for name, part in pipeline.components.items():
        if hasattr(part, "model_max_length"):
            parts[name] = {"model_max_length": part.model_max_length}
        elif hasattr(getattr(part, "config", None), "to_dict"):  # of transformers
            parts[name] = part.config.to_dict()
        elif part is not None and hasattr(part, "config"):
            parts[name] = dict(part.config)
    return parts


def _faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    for rule in RULES.get(config.pipeline_class, ()):
        value = parts.get(rule.part, {}).get(rule.key)
        if rule.part in parts and value not in rule.allowed:
            allowed = " or ".join(json.dumps(value) for value in rule.allowed)
            yield f"{_file(rule.part)} has {rule.key}={value!r}: {rule.reason}; it must be {allowed}"
    for name in (config.network_name, "vae", *config.text_parts):
        if parts.get(name, {}).get("quantization_config"):
            yield f"{_file(name)} has a quantization_config: quantized weights are neither trained nor sampled from here"
    if "vae" in parts:
        yield from _decoder_faults(config, parts)
    yield from sample_size_faults(_file(config.network_name), parts.get(config.network_name, {}))
    if "vae" in parts and config.network_name in parts:
        yield from _channel_faults(config, parts)
    if config.network_name in parts and all(name in parts for name in config.text_parts):
        yield from _width_faults(config, parts)
    yield from _length_faults(config, parts)


def _decoder_faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    vae = parts["vae"]
    if _value(config, parts, "vae", "out_channels") != 3:
        yield f"vae/config.json has out_channels={vae['out_channels']!r}: images have 3 channels, red, green and blue"
    tiny = vae.get("_class_name") == "AutoencoderTiny"
    if config.pipeline_class in FLOW_PIPELINES and vae.get("shift_factor", 0.0 if tiny else None) is None:
        yield f"vae/config.json has no shift_factor, which {config.pipeline_class} adds to latents: write a number"
    of_sdxl = config.pipeline_class == "StableDiffusionXLPipeline"
    yield from decoder_number_faults(vae, config.pipeline_class in FLOW_PIPELINES, of_sdxl)
    statistics = [vae.get(key) for key in ("latents_mean", "latents_std")]
    channels = _value(config, parts, "vae", "latent_channels")
    if of_sdxl and None not in statistics and any(len(value or ()) != channels for value in statistics):
        yield f"vae/config.json has latents_mean and latents_std of other lengths than latent_channels={channels}"


def _channel_faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    """The network takes and gives what the decoder decodes."""
    network = config.network_name
    packed = SQUARE if config.pipeline_class == "FluxPipeline" else 1
    latents = _value(config, parts, "vae", "latent_channels")
    taken = _value(config, parts, network, "in_channels")
    given = _value(config, parts, network, "out_channels") or taken
    if packed > 1:
        given *= _value(config, parts, network, "patch_size") ** 2
    if taken != packed * latents:
        yield (
            f"{_file(network)} has in_channels={taken}, and vae/config.json latent_channels={latents}: the network must take "
            f"{packed * latents} (those for inpainting, editing or upscaling take more)"
        )
    if given != taken:
        keys = ", ".join(f"{key}={parts[network].get(key)!r}" for key in ("out_channels", "patch_size"))
        yield f"{_file(network)} has in_channels={taken} and {keys}: the network must give as much as it takes"


def _width_faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    """The network takes what the text encoders give."""
    network, of = config.network_name, lambda part, key: _value(config, parts, part, key)
    wanted: list[tuple[str, Any, str, int]] = []  # key, its value, of what it must be the width, which is
    match config.pipeline_class:
        case "StableDiffusionPipeline" | "StableDiffusionXLPipeline":
            width = sum(of(part, "hidden_size") for part in config.text_parts)
            projected = parts[network].get("encoder_hid_dim")
            key = "encoder_hid_dim" if projected else "cross_attention_dim"
            wanted.append((key, of(network, key), "hidden_size of the text encoders", width))
        case "StableDiffusion3Pipeline":
            pooled = of("text_encoder", "projection_dim") + of("text_encoder_2", "projection_dim")
            key = "pooled_projection_dim"
            wanted.append((key, of(network, key), "projection_dim of the two CLIPs", pooled))
        case "FluxPipeline":
            key = "pooled_projection_dim"
            wanted.append((key, of(network, key), "hidden_size of text_encoder", of("text_encoder", "hidden_size")))
    t5 = next((part for part, (_, made) in config.text_parts.items() if made == "T5EncoderModel"), None)
    if t5:
        key = "joint_attention_dim"
        wanted.append((key, of(network, key), f"d_model of {t5}", of(t5, "d_model")))
    if config.pipeline_class == "StableDiffusionXLPipeline":
        ids, key = parts[network].get("addition_time_embed_dim"), "projection_class_embeddings_input_dim"
        pooled = of("text_encoder_2", "projection_dim")
        what = "6 × addition_time_embed_dim and projection_dim of text_encoder_2"
        wanted.append((key, parts[network].get(key), what, 6 * (ids or 0) + pooled))
    for key, value, what, width in wanted:
        if isinstance(value, int | None) and value != width:
            yield f"{_file(network)} has {key}={value!r}, and its text encoders give {width} ({what}): they must be equal"


def _length_faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    """Each CLIP has a position for every token that it is given."""
    clips = [part for part, (_, made) in config.text_parts.items() if made.startswith("CLIP")]
    of_its_own = config.pipeline_class == "StableDiffusionXLPipeline"
    lengths: dict[str, Any] = {}
    for clip, own in zip(clips, config.tokenizers, strict=False):
        tokenizer = own if of_its_own else config.tokenizers[0]
        if clip not in parts or tokenizer not in parts:
            continue
        length, most = parts[tokenizer].get("model_max_length"), _value(config, parts, clip, "max_position_embeddings")
        lengths[tokenizer] = length
        if not isinstance(length, int) or not 2 <= length <= most:
            shown = "no model_max_length" if length is None else f"model_max_length={length!r}"
            yield (
                f"{tokenizer}/tokenizer_config.json has {shown}, and {clip}/config.json max_position_embeddings={most}: a "
                f"tokenizer must give 2 to {most} tokens"
            )
    if len(set(lengths.values())) > 1:
        shown = " and ".join(
            f"{name}/tokenizer_config.json model_max_length={value}" for name, value in lengths.items()
        )
        yield f"{shown}: the two text encoders must read equally many tokens"


def _value(config: "DiffusersConfig", parts: Components, part: str, key: str) -> Any:
    """The key's value, or the libraries' default."""
    kind = "text_encoder" if part.startswith("text_encoder") else part
    defaults = DEFAULTS.get(config.pipeline_class if kind == "transformer" else kind, {})
    return parts[part].get(key, defaults.get(key))


def _file(part: str) -> str:
    return FILES.get(part, f"{part}/config.json")

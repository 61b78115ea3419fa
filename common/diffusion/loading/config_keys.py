"""Check the configuration keys of a model's parts before anything is computed from them.

Networks, decoders and text encoders are the libraries' own modules, so most keys take effect by themselves. The rest
are keys that diffusers' pipeline reads, and keys that must agree between two parts. Each of these is honoured as
diffusers honours it, or refused with part, key and value.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ddpo.common.diffusion.loading import image_keys
from ray_ddpo.common.diffusion.loading.key_rules import COLORS, GUIDANCE_INPUT, IMAGES, LABELS, TOKENS, Rule
from ray_ddpo.common.diffusion.loading.model_index import read_object, text_tower
from ray_ddpo.common.diffusion.loading.video_keys import (
    LTX_PIPELINE,
    WAN_PIPELINES,
    crop_faults,
    first_frame_faults,
    kind_faults,
    ltx_faults,
    second_network_faults,
    wan_faults,
)
from ray_ddpo.common.diffusion.schedulers.conversion import as_loaded, check_scheduler, is_number
from ray_ddpo.common.model_files.weight_files import SECOND_PART
from ray_ddpo.common.recipe.tables import SamplingTable

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig

Components = Mapping[str, Mapping[str, Any]]  # part name → its keys; model_index.json's are under INDEX
INDEX = "model_index"
FILES = {INDEX: "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
QWEN_PIPELINES = ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline")
NORMALIZED_PIPELINES = (*QWEN_PIPELINES, *WAN_PIPELINES)  # of latents with mean and deviation of each channel
FLUX_PIPELINES = ("FluxPipeline", "FluxKontextPipeline")
# Of latents with a shift_factor.
SHIFTED_PIPELINES = ("StableDiffusion3Pipeline", "ZImagePipeline", "Lumina2Pipeline", *FLUX_PIPELINES)
BATCH_NORMALIZED = ("Flux2Pipeline", "Flux2KleinPipeline")  # by the statistics of the decoder's batch norm
# Of networks that may predict variances too, in further channels.
VARIANCE_PIPELINES = ("SanaPipeline", "PixArtSigmaPipeline")
SOLVER_PIPELINES = ("SanaPipeline", *WAN_PIPELINES)  # of flows whose scheduler may be a solver
FLOW_PIPELINES = (
    *SHIFTED_PIPELINES,
    *NORMALIZED_PIPELINES,
    *BATCH_NORMALIZED,
    "SanaPipeline",
    LTX_PIPELINE,
    *image_keys.RULES,
)
INPAINTING = "StableDiffusionInpaintPipeline"  # its network reads the mask and the masked image's latents as well
DDIM_PIPELINES = ("StableDiffusionPipeline", INPAINTING, "StableDiffusionXLPipeline", "PixArtSigmaPipeline")
PATCH_KEYS = ("patch_size", "temporal_patch_size")  # of an image processor and of the encoder of its images
PIPELINES = (*DDIM_PIPELINES, *FLOW_PIPELINES)  # pipelines that are checked here
DEFAULTS: dict[str, dict[str, Any]] = {  # the libraries' defaults for absent keys
    "unet": {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280},
    "vae": {"latent_channels": 4, "out_channels": 3, "z_dim": 16},
    "text_encoder": {"hidden_size": 512, "projection_dim": 512, "max_position_embeddings": 77, "d_model": 512},
    "StableDiffusion3Pipeline": {
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
    },
    **dict.fromkeys(
        FLUX_PIPELINES,
        {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "patch_size": 1},
    ),
    **dict.fromkeys(
        QWEN_PIPELINES, {"in_channels": 64, "out_channels": 16, "joint_attention_dim": 3584, "patch_size": 2}
    ),
    "Flux2Pipeline": {"in_channels": 128, "joint_attention_dim": 15360, "patch_size": 1},
    "Flux2KleinPipeline": {"in_channels": 128, "joint_attention_dim": 15360, "patch_size": 1},
    "ZImagePipeline": {"in_channels": 16, "cap_feat_dim": 2560},
    **image_keys.DEFAULTS,
    "SanaPipeline": {"in_channels": 32, "out_channels": 32, "caption_channels": 2304},
    "PixArtSigmaPipeline": {"in_channels": 4, "out_channels": 8},
    LTX_PIPELINE: {"in_channels": 128, "out_channels": 128, "caption_channels": 4096},
    **dict.fromkeys(WAN_PIPELINES, {"in_channels": 16, "out_channels": 16, "text_dim": 4096}),
}
# Pipelines with a single text encoder → the network's key for the width of its states, from how many layers, the
# encoder's key, and transformers' default of that.
SINGLE_ENCODERS = {
    **dict.fromkeys(QWEN_PIPELINES, ("joint_attention_dim", 1, "hidden_size", 8192)),
    **image_keys.ENCODERS,
    "Flux2Pipeline": ("joint_attention_dim", 3, "hidden_size", 4096),
    "Flux2KleinPipeline": ("joint_attention_dim", 3, "hidden_size", 4096),
    "ZImagePipeline": ("cap_feat_dim", 1, "hidden_size", 4096),
    LTX_PIPELINE: ("caption_channels", 1, "d_model", 512),
    **dict.fromkeys(WAN_PIPELINES, ("text_dim", 1, "d_model", 512)),
    "SanaPipeline": ("caption_channels", 1, "hidden_size", 2304),
    "PixArtSigmaPipeline": ("caption_channels", 1, "d_model", 512),
}


UNET = (
    Rule("unet", "class_embed_type", (None,), LABELS),
    Rule("unet", "num_class_embeds", (None,), LABELS),
    Rule("unet", "time_cond_proj_dim", (None,), GUIDANCE_INPUT),
    Rule("unet", "encoder_hid_dim_type", (None, "text_proj"), IMAGES),
)
SQUARES = Rule("vae", "patch_size", (None, [2, 2], (2, 2)), "the network's tokens are squares of 2 × 2 latents")
RULES: dict[str, tuple[Rule, ...]] = {
    "SanaPipeline": (
        Rule("transformer", "guidance_embeds", (None, False), GUIDANCE_INPUT),
        Rule("vae", "in_channels", (None, 3), COLORS),
    ),
    **dict.fromkeys(QWEN_PIPELINES, (Rule("transformer", "guidance_embeds", (None, False), GUIDANCE_INPUT),)),
    **image_keys.RULES,
    LTX_PIPELINE: tuple(Rule("transformer", key, (None, 1), TOKENS) for key in ("patch_size", "patch_size_t")),
    "WanPipeline": tuple(Rule("transformer", key, (None,), IMAGES) for key in ("image_dim", "added_kv_proj_dim")),
    "Flux2Pipeline": (SQUARES,),
    "Flux2KleinPipeline": (SQUARES, Rule("transformer", "guidance_embeds", (False,), GUIDANCE_INPUT)),
    "ZImagePipeline": (Rule("transformer", "siglip_feat_dim", (None,), IMAGES),),
    **dict.fromkeys(
        ("StableDiffusionPipeline", INPAINTING),
        (*UNET, Rule("unet", "addition_embed_type", (None, "text"), IMAGES)),
    ),
    "StableDiffusionXLPipeline": (
        *UNET,
        Rule(
            "unet", "addition_embed_type", ("text_time",), "an SDXL gives its network the image's size and pooled text"
        ),
        Rule(INDEX, "add_watermarker", (None, False), "images are not watermarked here; set it to false"),
    ),
}


def check_keys(config: "DiffusersConfig", pipeline: Any = None) -> None:
    """Check the configuration of a loaded pipeline, or the files of the model's folder if there is one.

    Raises:
        ValueError: A key has a value that cannot be honoured as diffusers honours it, or two parts do not fit together.
    """
    if config.pipeline_class not in PIPELINES:  # a user's own family checks its keys itself
        return
    parts = _loaded(pipeline) if pipeline is not None else configuration_files(config)
    try:
        for fault in _faults(config, parts):
            raise ValueError(fault)
        if pipeline is None and "scheduler" in parts:
            name = config.pipeline_class
            check_scheduler(parts[INDEX], parts["scheduler"], name in FLOW_PIPELINES, name in SOLVER_PIPELINES)
    except ValueError as error:
        raise ValueError(f"policy.model is {config.model!r}: {error}") from None


def check_steps(config: "DiffusersConfig", sampling: SamplingTable) -> None:
    """Raise ValueError if the schedule in a folder has no such steps of DDIM, as far as files tell."""
    parts = configuration_files(config)
    if config.pipeline_class in DDIM_PIPELINES and "scheduler" in parts:
        from ray_ddpo.common.diffusion.schedulers.ddim import ddim_table

        ddim_table(as_loaded(parts[INDEX], parts["scheduler"])[0], sampling.num_steps, sampling.eta, "cpu")


def text_tokens(config: "DiffusersConfig", text: Mapping[str, Any]) -> int:
    """Return how many tokens a CLIP reads: its tokenizer's length if there is a folder, else its positions."""
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
    read |= {name: text_tower(read[name]) for name in config.text_parts}
    return {name: keys for name, keys in read.items() if keys}


def _read(path: Path) -> dict[str, Any]:
    """Return the keys of a file; empty if there is no such file, which loading reports."""
    return read_object(path) if path.is_file() else {}


def _loaded(pipeline: Any) -> Components:
    """Return the keys of every part of a loaded pipeline."""
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
    """Yield everything that is wrong with the parts' keys."""
    for rule in RULES.get(config.pipeline_class, ()):
        value = parts.get(rule.part, {}).get(rule.key)
        if rule.part in parts and value not in rule.allowed:
            allowed = " or ".join(dict.fromkeys(json.dumps(value) for value in rule.allowed))
            yield f"{_file(rule.part)} has {rule.key}={value!r}: {rule.reason}; it must be {allowed}"
    for name in (config.network_name, "vae", *config.text_parts):
        if parts.get(name, {}).get("quantization_config"):
            yield (
                f"{_file(name)} has a quantization_config: quantized weights are neither trained nor sampled from here"
            )
    if "vae" in parts:
        yield from _decoder_faults(config, parts)
    if config.pipeline_class in WAN_PIPELINES:
        yield from _wan_faults(config, parts)
    if config.pipeline_class == LTX_PIPELINE:
        yield from ltx_faults(parts.get("vae", {}))
    yield from image_keys.image_faults(config.pipeline_class, parts)
    yield from _sample_size_faults(_file(config.network_name), parts.get(config.network_name, {}))
    if "vae" in parts and config.network_name in parts:
        yield from _channel_faults(config, parts)
    if config.network_name in parts and all(name in parts for name in config.text_parts):
        yield from _width_faults(config, parts)
    yield from _length_faults(config, parts)
    yield from _image_reader_faults(config)


def _wan_faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    """Yield what is wrong with a model of Wan: another family trains it, or its parts do not fit each other."""
    has_experts = bool(config.frozen_parts or config.joined_parts)
    per_token = bool(config.index_classes)  # of the one model that is published for text to video
    yield from kind_faults(has_experts, bool(config.reads_inputs), per_token, parts.get(INDEX, {}))
    yield from wan_faults(parts.get("vae", {}), parts.get("transformer", {}))
    if config.reads_inputs and "transformer" in parts:
        yield from first_frame_faults("image_encoder" in config.text_parts, per_token, parts["transformer"])
    second = _read(config.folder() / SECOND_PART / "config.json") if has_experts else {}
    if second and "transformer" in parts:
        yield from second_network_faults(parts["transformer"], second)
    if "image_encoder" in parts:
        reader = _read(config.folder() / "image_processor" / "preprocessor_config.json")
        yield from crop_faults(parts["image_encoder"], reader)


def _decoder_faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    """Yield what is wrong with the decoder's keys. An absent key has the class's default."""
    vae, adds_shift = parts["vae"], config.pipeline_class in SHIFTED_PIPELINES
    if config.pipeline_class in NORMALIZED_PIPELINES:
        yield from _statistics_faults(config, parts, required=True)
        return
    if _value(config, parts, "vae", "out_channels") != 3:
        yield f"vae/config.json has out_channels={vae['out_channels']!r}: {COLORS}"
    if config.pipeline_class in BATCH_NORMALIZED:
        if not is_number(epsilon := vae.get("batch_norm_eps", 0.0)):
            yield f"vae/config.json has batch_norm_eps={epsilon!r}, which is added to variances: it must be a number"
        return
    shift = vae.get("shift_factor", 0.0 if vae.get("_class_name") == "AutoencoderTiny" else None)
    if adds_shift and shift is None:
        yield f"vae/config.json has no shift_factor, which {config.pipeline_class} adds to latents: write a number"
    scale = vae.get("scaling_factor", 1.0)
    if not is_number(scale) or scale == 0:
        yield (
            f"vae/config.json has scaling_factor={scale!r}, by which latents are divided: it must be a number "
            "other than 0"
        )
    if adds_shift and not is_number(shift):
        yield f"vae/config.json has shift_factor={shift!r}, which is added to latents: it must be a number"
    if config.pipeline_class == "StableDiffusionXLPipeline":  # it multiplies by latents_std and adds latents_mean
        yield from _statistics_faults(config, parts, required=False)


def _statistics_faults(config: "DiffusersConfig", parts: Components, required: bool) -> Iterator[str]:
    """Yield what is wrong with the latents' mean and standard deviation."""
    vae, channels = parts["vae"], _value(config, parts, "vae", config.latent_key)
    keys = [key for key in ("latents_mean", "latents_std") if key in vae or not required]  # absent: the class's default
    statistics = {key: vae.get(key) for key in keys}
    for key, values in statistics.items():
        if (required or values is not None) and not (isinstance(values, list | tuple) and all(map(is_number, values))):
            or_null = "" if required else ", or null"
            yield f"vae/config.json has {key}={values!r:.80}: it must be a list of numbers, one a channel{or_null}"
            return
    if None not in statistics.values() and any(len(values or ()) != channels for values in statistics.values()):
        yield f"vae/config.json has latents_mean and latents_std of other lengths than {config.latent_key}={channels}"
    if required and 0 in (vae.get("latents_std") or ()):
        yield "vae/config.json has latents_std with a 0, by which latents would lose a channel: write numbers above 0"


def _channel_faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    """Yield disagreements between the network's channels and the decoder's."""
    network, packed = config.network_name, config.latent_packing
    latents = _value(config, parts, "vae", config.latent_key)
    taken = _value(config, parts, network, "in_channels")
    given = _value(config, parts, network, "out_channels") or taken
    if packed > 1:
        given *= _value(config, parts, network, "patch_size") ** 2
    if config.pipeline_class in VARIANCE_PIPELINES and parts[network].get("out_channels", taken) is None:
        yield f"{_file(network)} has out_channels=None, and the pipeline computes with it: write {taken} or {2 * taken}"
    expected = config.taken_channels(latents)
    if taken != expected:
        yield (
            f"{_file(network)} has in_channels={taken}, and vae/config.json {config.latent_key}={latents}: the network "
            f"must take {expected} (networks for inpainting, editing or upscaling take more)"
        )
    with_variances = config.pipeline_class in VARIANCE_PIPELINES and given == 2 * taken
    if given - packed * latents != taken - expected and not with_variances:
        keys = ", ".join(f"{key}={parts[network].get(key)!r}" for key in ("out_channels", "patch_size"))
        yield f"{_file(network)} has in_channels={taken} and {keys}: the network must give as much as it takes"


def _width_faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    """Yield disagreements between the widths that the network takes and those that the text encoders give."""
    network, value_of = config.network_name, lambda part, key: _value(config, parts, part, key)
    single = SINGLE_ENCODERS.get(config.pipeline_class)
    wanted: list[tuple[str, str, int]] = []  # the network's key, what must have this width, its width
    if config.pipeline_class == "StableDiffusion3Pipeline":
        pooled = value_of("text_encoder", "projection_dim") + value_of("text_encoder_2", "projection_dim")
        wanted.append(("pooled_projection_dim", "projection_dim of the two CLIPs", pooled))
    elif config.pipeline_class in FLUX_PIPELINES:
        width = value_of("text_encoder", "hidden_size")
        wanted.append(("pooled_projection_dim", "hidden_size of text_encoder", width))
    elif single:
        keys, (key, layers, own, default) = parts["text_encoder"], single
        width = layers * (keys.get("text_config") or keys).get(own, default)
        times = f"{layers} × " if layers > 1 else ""
        wanted.append((key, f"{times}{own} of text_encoder", width))
    else:
        width = sum(value_of(part, "hidden_size") for part in config.text_parts)
        key = "encoder_hid_dim" if parts[network].get("encoder_hid_dim") else "cross_attention_dim"
        wanted.append((key, "hidden_size of the text encoders", width))
    t5s = () if single else (part for part, (_, made) in config.text_parts.items() if made == "T5EncoderModel")
    for t5 in t5s:
        wanted.append(("joint_attention_dim", f"d_model of {t5}", value_of(t5, "d_model")))
    if config.pipeline_class == "StableDiffusionXLPipeline":
        width = 6 * (parts[network].get("addition_time_embed_dim") or 0) + value_of("text_encoder_2", "projection_dim")
        what = "6 × addition_time_embed_dim and projection_dim of text_encoder_2"
        wanted.append(("projection_class_embeddings_input_dim", what, width))
    for key, what, width in wanted:
        value = value_of(network, key)
        if isinstance(value, int | None) and value != width:
            yield (
                f"{_file(network)} has {key}={value!r}, and its text encoders give {width} ({what}): they must be equal"
            )


def _length_faults(config: "DiffusersConfig", parts: Components) -> Iterator[str]:
    """Yield CLIPs that have fewer positions than their tokenizer gives tokens."""
    clips = [part for part, (_, made) in config.text_parts.items() if made.startswith("CLIPText")]
    separate_lengths = config.pipeline_class == "StableDiffusionXLPipeline"
    lengths: dict[str, Any] = {}
    for clip, own in zip(clips, config.tokenizers, strict=False):
        tokenizer = own if separate_lengths else config.tokenizers[0]
        if clip not in parts or tokenizer not in parts:
            continue
        length, most = parts[tokenizer].get("model_max_length"), _value(config, parts, clip, "max_position_embeddings")
        lengths[tokenizer] = length
        if not isinstance(length, int) or not 2 <= length <= most:
            shown = "no model_max_length" if length is None else f"model_max_length={length!r}"
            yield (
                f"{tokenizer}/tokenizer_config.json has {shown}, and {clip}/config.json "
                f"max_position_embeddings={most}: a tokenizer must give 2 to {most} tokens"
            )
    if len(set(lengths.values())) > 1:
        shown = " and ".join(
            f"{name}/tokenizer_config.json model_max_length={value}" for name, value in lengths.items()
        )
        yield f"{shown}: the two text encoders must read equally many tokens"


def _value(config: "DiffusersConfig", parts: Components, part: str, key: str) -> Any:
    """Return the key's value, or the libraries' default."""
    kind = "text_encoder" if part.startswith("text_encoder") else part
    defaults = DEFAULTS.get(config.pipeline_class if kind == "transformer" else kind, {})
    return parts[part].get(key, defaults.get(key))


def _file(part: str) -> str:
    return FILES.get(part, f"{part}/config.json")


def _sample_size_faults(file: str, network: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the network's default latent size, which determines the default image size."""
    size = network.get("sample_size")
    sides = [size] * 2 if not isinstance(size, list | tuple) else list(size)
    if size is not None and (len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides)):
        yield f"{file} has sample_size={size!r}: it must be a whole number above 0, or [height, width] of such"


def _image_reader_faults(config: "DiffusersConfig") -> Iterator[str]:
    """Yield keys of an image processor with which the language model cannot read its images."""
    if "processor" not in config.tokenizers:
        return
    folder, file, encoder = config.folder(), "processor/preprocessor_config.json", "text_encoder/config.json"
    reader, vision = _read(folder / file), _read(folder / encoder).get("vision_config") or {}
    if reader.get("do_resize") is False:
        yield f"{file} has do_resize=False: an image must have sides of complete patches; it must be true"
    for key, own in {"merge_size": "spatial_merge_size", **{key: key for key in PATCH_KEYS}}.items():
        if key in reader and own in vision and reader[key] != vision[own]:
            yield f"{file} has {key}={reader[key]!r}, and {encoder} vision_config.{own}={vision[own]!r}: give one value"

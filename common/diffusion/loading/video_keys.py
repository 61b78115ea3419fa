"""Check the configuration keys of models of video, which pipelines compute sizes and numbers of frames with."""

from collections.abc import Iterator, Mapping
from typing import Any

WAN_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
LTX_PIPELINE = "LTXPipeline"


def expert_faults(has_experts: bool, index: Mapping[str, Any]) -> Iterator[str]:
    """Yield that the model has one network where the family has two experts, or the other way round."""
    boundary = index.get("boundary_ratio")
    if "_class_name" in index and has_experts != (boundary is not None):
        number, family = ("two networks", "wan22") if boundary is not None else ("one network", "wan")
        remedy = f'policy.name must be "{family}"'
        if index["_class_name"] != "WanPipeline":
            remedy = "no family here trains one that reads images"
        yield f"model_index.json has boundary_ratio={boundary!r}, of a model with {number}: {remedy}"
    elif index.get("expand_timesteps") and index["_class_name"] != "WanPipeline":
        yield "model_index.json has expand_timesteps=True, and no family here trains a model that reads images so"
    elif boundary is not None and not (isinstance(boundary, int | float) and 0 < boundary < 1):
        yield f"model_index.json has boundary_ratio={boundary!r}: it must be a number between 0 and 1"


def wan_faults(decoder: Mapping[str, Any], network: Mapping[str, Any]) -> Iterator[str]:
    """Yield keys that say something else than the decoder and the network do. An absent key has the class's default."""
    squares = decoder.get("patch_size") or 1
    made = {
        "scale_factor_spatial": (8, squares * 2 ** (len(decoder.get("dim_mult", (1, 2, 4, 4))) - 1)),
        "scale_factor_temporal": (4, 2 ** sum(decoder.get("temperal_downsample", (False, True, True)))),
        "out_channels": (3, 3 * squares**2),
    }
    for key, (default, true) in made.items():
        value = decoder.get(key, default)
        if value != true:
            yield f"vae/config.json has {key}={value!r}: its layers make it {true}"
    frames = (network.get("patch_size") or (1,))[0]
    if frames != 1:
        yield (
            f"transformer/config.json has patch_size={network['patch_size']!r}: a token of several frames of latents "
            "leaves out frames of some videos; the first number must be 1"
        )


def ltx_faults(decoder: Mapping[str, Any]) -> Iterator[str]:
    """Yield keys of the decoder that say another size than it makes, or with which it adds noise of its own."""
    halvings = {}
    for side in ("", "decoder_"):
        key = f"{side}spatio_temporal_scaling"
        halvings[key] = 2 ** sum(decoder.get(key) or (True, True, True, False))
    if len(set(halvings.values())) > 1:
        yield f"vae/config.json has {' and '.join(halvings)} of different factors, {list(halvings.values())}"
    for key, patch, default in (("spatial", "patch_size", 4), ("temporal", "patch_size_t", 1)):
        given, true = decoder.get(f"{key}_compression_ratio"), min(halvings.values()) * decoder.get(patch, default)
        if given not in (None, true):
            yield f"vae/config.json has {key}_compression_ratio={given!r}: its layers make it {true}"
    if any(decoder.get("decoder_inject_noise") or ()):
        yield "vae/config.json has decoder_inject_noise with a true: one latent would have many videos; set all to false"

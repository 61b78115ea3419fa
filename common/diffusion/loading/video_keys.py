"""Check the configuration keys of models of video, which pipelines compute sizes and numbers of frames with."""

from collections.abc import Iterator, Mapping
from typing import Any

WAN_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
LTX_PIPELINE = "LTXPipeline"


def kind_faults(has_experts: bool, reads_images: bool, is_per_token: bool, index: Mapping[str, Any]) -> Iterator[str]:
    """Yield that another family of Wan trains the model.

    Args:
        has_experts: whether the family has two networks.
        reads_images: whether it begins with an input image.
        is_per_token: whether it does so with a timestep for each token.
        index: the model's own.
    """
    boundary, expands = index.get("boundary_ratio"), bool(index.get("expand_timesteps"))
    if "_class_name" not in index:
        return
    family = "wan22" if boundary is not None else "wan"
    if reads_images:
        family = "wan_ti2v" if expands and boundary is None else f"{family}_i2v"
    if has_experts != (boundary is not None):
        number = "one network" if boundary is None else "two networks"
        yield f'model_index.json has boundary_ratio={boundary!r}, of a model with {number}: policy.name must be "{family}"'
    elif boundary is not None and not (isinstance(boundary, int | float) and 0 < boundary < 1):
        yield f"model_index.json has boundary_ratio={boundary!r}: it must be a number between 0 and 1"
    elif reads_images and expands != is_per_token:
        given = f"model_index.json has expand_timesteps={index.get('expand_timesteps')!r}"
        if has_experts:
            yield f"{given} and boundary_ratio={boundary!r}: no family here trains a model that reads images so"
        else:
            yield f'{given}: policy.name must be "{family}"'


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

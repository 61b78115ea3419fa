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


def second_network_faults(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """Yield numbers of channels that the second network does not share with the first one."""
    for key in ("in_channels", "out_channels"):
        if second.get(key, 16) != first.get(key, 16):  # the class's default
            yield f"transformer_2/config.json has {key}={second.get(key)!r}, and transformer/config.json {first.get(key)!r}"


def first_frame_faults(has_image_encoder: bool, is_per_token: bool, network: Mapping[str, Any]) -> Iterator[str]:
    """Yield keys with which the network does not read the first frame as the family's pipeline gives it.

    Args:
        has_image_encoder: whether the family has an image encoder.
        is_per_token: whether it gives a timestep for each token.
        network: the keys of the first network.
    """
    width, patch = network.get("image_dim"), list(network.get("patch_size") or (1, 2, 2))
    if width is not None and not has_image_encoder:
        yield f"transformer/config.json has image_dim={width!r}: it reads an image encoder's states, and there is none"
    if width is None and has_image_encoder:
        yield "transformer/config.json has no image_dim: it does not read the states of the model's image encoder"
    if is_per_token and patch != [1, 2, 2]:
        yield f"transformer/config.json has patch_size={patch}: the pipeline gives a timestep to each of [1, 2, 2] latents"


def crop_faults(encoder: Mapping[str, Any], reader: Mapping[str, Any]) -> Iterator[str]:
    """Yield that the image processor makes images of another size than the image encoder reads."""
    crop, size = reader.get("crop_size"), encoder.get("image_size", 224)
    sides = set(crop.values()) if isinstance(crop, Mapping) else {crop}
    if crop is not None and reader.get("do_center_crop", True) and sides != {size}:
        file = "image_processor/preprocessor_config.json"
        yield f"{file} has crop_size={crop!r}, and image_encoder/config.json image_size={size!r}: give one size"


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

"""Check the configuration keys of models of video, which pipelines compute sizes and numbers of frames with."""

from collections.abc import Iterator, Mapping
from typing import Any

WAN_PIPELINES = ("WanPipeline",)


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

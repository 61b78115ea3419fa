"""Check the configuration keys of HunyuanImage models that say how images are guided and how large they are."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

HUNYUAN_PIPELINE = "HunyuanImagePipeline"
GUIDERS = ("ClassifierFreeGuidance", "AdaptiveProjectedMixGuidance")  # the second is replaced by the first


def guider_faults(index: Mapping[str, Any]) -> Iterator[str]:
    """Yield guiders in the model's index that guide in another way than the published ones."""
    for part in ("guider", "ocr_guider"):
        name = (index.get(part) or (None, None))[1]
        if name is not None and name not in GUIDERS:
            yield (
                f"model_index.json has {part}={name}: a sampler guides with sampling.guidance_scale, as {GUIDERS[0]}; "
                f"it must be one of {', '.join(GUIDERS)}, or null"
            )


def compression_faults(decoder: Mapping[str, Any]) -> Iterator[str]:
    """Yield a factor between pixels and latents that the decoder's layers do not have."""
    ratio, levels = decoder.get("spatial_compression_ratio"), len(decoder.get("block_out_channels") or ())
    true = 2 ** (levels - 1) if levels else None
    if isinstance(ratio, int) and ratio > 0:
        true = 2 ** min(math.ceil(math.log2(ratio)), levels - 1)
    if ratio != true:
        yield f"vae/config.json has spatial_compression_ratio={ratio!r}: its layers make it {true}"

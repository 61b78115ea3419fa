"""Check configuration keys that only models of HunyuanImage or Lumina 2 have, or that their pipelines ignore."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ray_ddpo.common.diffusion.loading.key_rules import COLORS, GUIDANCE_INPUT, Rule

HUNYUAN_PIPELINE, LUMINA_PIPELINE = "HunyuanImagePipeline", "Lumina2Pipeline"
GUIDERS = ("ClassifierFreeGuidance", "AdaptiveProjectedMixGuidance")  # the second is replaced by the first
DEFAULTS: dict[str, dict[str, Any]] = {
    HUNYUAN_PIPELINE: {"in_channels": 64, "out_channels": 64, "text_embed_dim": 3584},
    LUMINA_PIPELINE: {"in_channels": 16, "cap_feat_dim": 1024},
}
ENCODERS = {  # the network's key for the width of its text, of how many layers, the encoder's key and its default
    HUNYUAN_PIPELINE: ("text_embed_dim", 1, "hidden_size", 8192),
    LUMINA_PIPELINE: ("cap_feat_dim", 1, "hidden_size", 2304),
}
RULES: dict[str, tuple[Rule, ...]] = {
    HUNYUAN_PIPELINE: (
        Rule("transformer", "guidance_embeds", (None, False), GUIDANCE_INPUT),
        Rule("transformer", "use_meanflow", (None, False), "a network that is told where a step ends is not trained"),
        Rule("scheduler", "use_dynamic_shifting", (None, False), "the pipeline shifts by no number of image tokens"),
        Rule("vae", "in_channels", (None, 3), COLORS),
    ),
    LUMINA_PIPELINE: (Rule("scheduler", "num_train_timesteps", (None, 1000), "the network's time has 1000 steps"),),
}


def image_faults(pipeline: str, parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is wrong with a model's keys beside what `RULES` say, where the pipeline is one of these."""
    network, decoder = parts.get("transformer", {}), parts.get("vae", {})
    if pipeline == HUNYUAN_PIPELINE:
        yield from _guider_faults(parts.get("model_index", {}))
        yield from _compression_faults(decoder)
        width, expected = network.get("text_embed_2_dim"), parts.get("text_encoder_2", {}).get("d_model", 512)
        if network and "text_encoder_2" in parts and width != expected:
            yield (
                f"transformer/config.json has text_embed_2_dim={width!r}, and text_encoder_2/config.json "
                f"d_model={expected}: they must be equal"
            )
        if network.get("out_channels", 0) is None:
            yield "transformer/config.json has out_channels=None, and the network computes with it: write in_channels"
    if pipeline == LUMINA_PIPELINE and len(decoder.get("block_out_channels", range(4))) != 4:
        yield (
            f"vae/config.json has block_out_channels={decoder['block_out_channels']!r}: the pipeline takes 8 × 8 pixels "
            "for a latent; there must be 4 of them"
        )


def _guider_faults(index: Mapping[str, Any]) -> Iterator[str]:
    """Yield guiders in the model's index that guide in another way than the published ones."""
    for part in ("guider", "ocr_guider"):
        name = (index.get(part) or (None, None))[1]
        if name is not None and name not in GUIDERS:
            yield (
                f"model_index.json has {part}={name}: a sampler guides with sampling.guidance_scale, as {GUIDERS[0]}; "
                f"it must be one of {', '.join(GUIDERS)}, or null"
            )


def _compression_faults(decoder: Mapping[str, Any]) -> Iterator[str]:
    """Yield a factor between pixels and latents that the decoder's layers do not have."""
    ratio, levels = decoder.get("spatial_compression_ratio"), len(decoder.get("block_out_channels") or ())
    true = 2 ** (levels - 1) if levels else None
    if isinstance(ratio, int) and ratio > 0:
        true = 2 ** min(math.ceil(math.log2(ratio)), levels - 1)
    if ratio != true:
        yield f"vae/config.json has spatial_compression_ratio={ratio!r}: its layers make it {true}"

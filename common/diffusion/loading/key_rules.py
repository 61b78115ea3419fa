"""Rules for single configuration keys of a model's parts, and the reasons that they share."""

from typing import Any, NamedTuple


class Rule(NamedTuple):
    """One key of one part: the allowed values, and why no others are."""

    part: str
    key: str
    allowed: tuple[Any, ...]
    reason: str


LABELS = "the pipeline gives its network no class labels"
IMAGES = "the pipeline gives its network nothing but text"
TOKENS = "a token is one latent here"
GUIDANCE_INPUT = "a network with the guidance scale as an input is sampled by another method"
COLORS = "images have 3 channels, red, green and blue"

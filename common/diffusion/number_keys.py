"""Check the numeric keys of a model's configuration that are computed with before a library class validates them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

DECODER = "vae/config.json"
BETA_RANGES = ("linear", "scaled_linear")  # beta schedules from beta_start to beta_end


def is_number(value: Any) -> bool:
    """Return whether a key's value is a finite number. Booleans are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decoder_number_faults(vae: Mapping[str, Any], adds_shift: bool, takes_statistics: bool) -> Iterator[str]:
    """Yield what is wrong with the keys that scale latents before they are decoded.

    Args:
        vae: the decoder's keys. An absent key has the class's default.
        adds_shift: whether the family's pipeline adds `shift_factor`.
        takes_statistics: whether the family's pipeline multiplies by `latents_std` and adds `latents_mean`.
    """
    scale = vae.get("scaling_factor", 1.0)
    if not is_number(scale) or scale == 0:
        yield f"{DECODER} has scaling_factor={scale!r}, by which latents are divided: it must be a number other than 0"
    shift = vae.get("shift_factor")
    if adds_shift and shift is not None and not is_number(shift):
        yield f"{DECODER} has shift_factor={shift!r}, which is added to latents: it must be a number"
    for key in ("latents_mean", "latents_std") if takes_statistics else ():
        values = vae.get(key)
        if values is not None and not (isinstance(values, list | tuple) and all(map(is_number, values))):
            yield f"{DECODER} has {key}={values!r:.80}: it must be a list of numbers, one a channel, or null"


def sample_size_faults(file: str, network: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the network's default latent size, which determines the default image size."""
    size = network.get("sample_size")
    sides = [size] * 2 if not isinstance(size, list | tuple) else list(size)
    if size is not None and (len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides)):
        yield f"{file} has sample_size={size!r}: it must be a whole number above 0, or [height, width] of such"


def bad_beta(written: Mapping[str, Any]) -> str | None:
    """Return the key of a beta range that is not a number or is negative; None if there is none.

    The betas that follow from valid numbers are checked elsewhere.
    """
    if written.get("trained_betas") is not None or written.get("beta_schedule", "linear") not in BETA_RANGES:
        return None
    ends = {key: written[key] for key in ("beta_start", "beta_end") if key in written}
    return next((key for key, value in ends.items() if not is_number(value) or value < 0), None)


def named_keys(keys: Mapping[str, Any], said: str) -> str:
    """Return the keys whose text a library's error quotes, as words for the end of a message; empty if there are none."""
    quoted = [
        f"{key}={value!r}" for key, value in keys.items() if isinstance(value, str) and value and repr(value) in said
    ]
    return f" ({', '.join(quoted)})" if quoted else ""

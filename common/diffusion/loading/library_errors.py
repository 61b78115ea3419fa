"""Turn what diffusers, transformers and torch raise on an unusable configuration into one line for the user."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.user_code.frames import LIBRARIES

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy

# What those libraries raise if keys do not fit together. Running out of memory has another cause.
RAISED = (
    *(ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, ImportError, NotImplementedError),
    *(AssertionError, ZeroDivisionError, OverflowError),
)

PIPELINES_FILE = "diffusers/pipelines/pipeline_utils.py"  # loads one part after the other
NOT_MADE = "its parts cannot be made as their config.json say"


@contextmanager
def library_errors(model: str | None, what: str, keys: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Raise ValueError with `what` and the library's message if a library raises. The project's own errors pass.

    Args:
        model: named at the beginning of the error; if None, a caller adds the name.
        what: what cannot be done.
        keys: the part's configuration. A library's error may quote the text values without their names.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*RAISED, *_of_transformers()) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not LIBRARIES.search(frames[-1].f_code.co_filename):
            raise
        said = " ".join(str(error).split())[:400]
        key = "" if model is None else f"policy.model is {model!r}: "
        texts = {key: repr(value) for key, value in (keys or {}).items() if isinstance(value, str) and value}
        quoted = ", ".join(f"{key}={text}" for key, text in texts.items() if text in said)
        named = f" ({quoted})" if quoted else ""
        raise ValueError(f"{key}{what}: {_part(frames)}{type(error).__name__}: {said}{named}") from error


def _part(frames: list[FrameType]) -> str:
    """Return the part that a pipeline was loading and the class of the part that raised, as far as they are known."""
    loading = [frame.f_locals.get("name") for frame in frames if frame.f_code.co_filename.endswith(PIPELINES_FILE)]
    owners = [type(frame.f_locals.get("self")) for frame in frames]
    classes = [kind.__name__ for kind in owners if issubclass(kind, nn.Module) or kind.__name__.endswith("Config")]
    named = [name for name in loading if isinstance(name, str)]
    return "".join(f"{word}: " for word in (*named[:1], *classes[:1]))


def _of_transformers() -> tuple[type[Exception], ...]:
    """Return what transformers' configurations raise on values that they refuse, which is not a ValueError."""
    from huggingface_hub.errors import StrictDataclassError

    return (StrictDataclassError,)


def _check_tokens(policy: "DiffusersPolicy") -> None:
    """Raise ValueError if a tokenizer puts a token into each prompt that its text encoder does not have."""
    for reader in policy.text_readers():
        tokenizer, part = reader.tokenizer, reader.name
        known = getattr(policy.pipeline, part).get_input_embeddings().num_embeddings
        given = tokenizer("", padding="max_length", truncation=True, max_length=reader.length)["input_ids"]
        for key in ("pad_token", "bos_token", "eos_token"):
            token = getattr(tokenizer, f"{key}_id", None)
            if token in given and token >= known:
                raise ValueError(
                    f"policy.model is {policy.config.model!r}: {part.replace('text_encoder', 'tokenizer')}/"
                    f"tokenizer_config.json has {key}={getattr(tokenizer, key)!r}, token {token}, and "
                    f"{part}/config.json vocab_size={known}: it must be a token that the text encoder has"
                )


@torch.no_grad()
def try_once(policy: "DiffusersPolicy") -> None:
    """Take one row from a prompt to an image. Raise ValueError if a part cannot process what the others give it."""
    model, config = policy.config.model, policy.config
    text = ", ".join(f"{part}/config.json" for part in config.text_parts)
    _check_tokens(policy)
    with library_errors(model, f"a prompt cannot be encoded as {text} and the tokenizers' files say"):
        conditioning = policy.encode([""])
    latents, first = (torch.zeros(1, *shape, device=policy.device) for shape in (policy.latent_shape, ()))
    networks = [config.trained_part, *config.frozen_parts, *config.joined_parts]
    steps = [0, policy.num_steps - 1] if len(networks) > 1 else [0]  # the second network takes the last one
    network = " and ".join(f"{part}/config.json" for part in networks)
    with library_errors(model, f"the network cannot compute a step as {network} says, on what {text} give it"):
        for step in steps:
            policy.transition(latents, first.long() + step, select_rows(conditioning, first.long()))
    with library_errors(model, "latents cannot be decoded as vae/config.json says"):
        policy.decode(latents)

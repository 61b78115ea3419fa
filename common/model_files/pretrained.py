"""Load transformers' models and tokenizers so that missing weights are errors instead of random numbers."""

from pathlib import Path
from typing import Any, Literal

import torch

from ray_ddpo.common.model_files.model_hub import Weights, cannot_load, errors_only, read_pretrained
from ray_ddpo.common.trajectory import DTYPES

Precision = Literal["auto", "float32", "float16", "bfloat16"]  # auto: half on CUDA, float32 elsewhere
MODEL_FILES = ("config.json", "*.safetensors")
TOKENIZER_FILE = "tokenizer.json"


def torch_dtype(precision: Precision, device: str) -> torch.dtype:
    """Return the dtype of weights and activations on `device`."""
    automatic = "float16" if device.startswith("cuda") else "float32"
    return DTYPES[automatic if precision == "auto" else precision]


def weight_bytes(parameters: int, precision: Precision) -> int:
    """Return the bytes of `parameters` weights; for "auto", those on a GPU."""
    return parameters * torch_dtype(precision, "cuda").itemsize


def read_model(cls: Any, source: str, dtype: torch.dtype, missing: str) -> Any:
    """Return a model from a folder or the hub, on the CPU. Raise ValueError (`missing`, and why) if there is none."""

    def read(place: str | Path, local_files_only: bool) -> Any:
        return loaded(cls, place, missing, dtype=dtype, local_files_only=local_files_only)

    return read_pretrained(source, read, missing)


def loaded(cls: Any, place: str | Path | None, missing: str, **options: Any) -> Any:
    """Return `cls.from_pretrained`, frozen and in eval mode. Neither pickles nor code next to the weights are run.

    If a weight is missing or does not fit, raise ValueError, which begins with `missing`.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with errors_only():  # hide warnings about unneeded weights, such as a CLIP's other tower
        model, found = cls.from_pretrained(place, use_safetensors=True, trust_remote_code=False, **options)
    if fault := weights_fault(found):
        raise ValueError(f"{missing} ({fault})")
    return model.eval().requires_grad_(False)


def weights_fault(found: dict[str, Any], refuse_unexpected: bool = False) -> str:
    """Describe what is wrong by a loading report of transformers or diffusers; empty if all weights are from the file.

    Weights that the model does not have are a fault if `refuse_unexpected`.
    """
    absent, misfits = sorted(found["missing_keys"]), sorted(name for name, *_ in found["mismatched_keys"])
    unexpected = sorted(found["unexpected_keys"])
    if absent:
        beside = f"; the file has {unexpected[0]}, {len(unexpected)} that are unknown" if unexpected else ""
        if any(".base_layer." in name for name in unexpected):
            beside += "; a LoRA was not unloaded before saving: fuse it, call unload_lora_weights(), then save again"
        return f"weights are missing: {absent[0]}, {len(absent)} in all{beside}"
    if misfits:
        return f"weights are of another size than the configuration says: {misfits[0]}, {len(misfits)} in all"
    if unexpected and refuse_unexpected:
        return (
            f"the file has weights that the configuration has no place for: {unexpected[0]}, {len(unexpected)} in all"
        )
    return ""


def read_tokenizer(tokenizer_class: Any, tokenizer: Weights) -> Any:
    """Return a tokenizer of this class. Raise ValueError if there is none."""
    from huggingface_hub import hf_hub_download

    def read(place: str | Path, local_files_only: bool) -> Any:
        # Look for the vocabulary first, because without one transformers makes an empty tokenizer.
        if isinstance(place, Path):
            (place / TOKENIZER_FILE).open().close()
        else:
            hf_hub_download(place, TOKENIZER_FILE, local_files_only=local_files_only)
        return tokenizer_class.from_pretrained(place, local_files_only=local_files_only, trust_remote_code=False)

    return read_pretrained(tokenizer.source, read, cannot_load(tokenizer))

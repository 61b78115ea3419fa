"""Find faults in model files: empty, git-LFS pointer, web page, pickle, truncated, or with non-finite weights."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGES = (b"<!doctype html", b"<html", b"<?xml")
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's archive, and plain pickles
HEAD = 64  # bytes


class DamagedFile(ValueError):
    """A file that is not what its name says. The text names the file, the reason, and what to do."""

    def __init__(self, path: Path, fault: str) -> None:
        super().__init__(f"{path} is damaged ({fault}): copy or download that file again")


def check_file(path: Path) -> None:
    """Raise DamagedFile if a file cannot be what its name says."""
    if fault := fault_of(path):
        raise DamagedFile(path, fault)


def fault_of(path: Path) -> str | None:
    """Return why a file cannot be what its name says, or None. Of weights, only the header is read."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        return error.strerror or str(error)
    if not head:
        return "it is empty"
    if head.startswith(LFS_POINTER):
        return "it is a git-LFS pointer and not the file itself: `git lfs pull` in its folder gets the file"
    if head.lstrip().lower().startswith(WEB_PAGES):
        return "it is a web page, as saved by a download that needed a login"
    if path.suffix == ".safetensors":
        return _fault_of_weights(path, head)
    if head.startswith(PICKLES[0]) and not zipfile.is_zipfile(path):
        return "it was cut off: the end of torch's archive is not there"
    return _fault_of_json(path) if path.suffix == ".json" else None


def _fault_of_weights(path: Path, head: bytes) -> str | None:
    """Return what is wrong with a safetensors file, or None."""
    from safetensors import SafetensorError, safe_open

    if head.startswith(PICKLES):
        return "it is a pickle with another name, and pickles are not opened"
    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error).strip().partition("\n")[0]


def _fault_of_json(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    return None


def first_not_finite(arrays: Mapping[str, Any]) -> str | None:
    """Return the name of the first array or tensor with a NaN or infinity; None if all are finite."""
    return next((name for name, array in arrays.items() if not _is_finite(array)), None)


def refuse_not_finite(file: str | Path, arrays: Mapping[str, Any]) -> None:
    """Raise ValueError if an array or tensor of `file` is not finite."""
    if name := first_not_finite(arrays):
        count = sum(not _is_finite(array) for array in arrays.values())
        raise ValueError(
            f"{file}: the tensor {name} holds NaN or infinity ({count} of {len(arrays)} do), so these weights are of no use: "
            "restore the file, or take an earlier checkpoint's weights (--from RUN@ROUND)"
        )


def _is_finite(array: Any) -> bool:
    if not isinstance(array, np.ndarray):
        small = array.is_floating_point() and array.dtype.itemsize == 1  # float8 has no isfinite
        return bool((array.float() if small else array).isfinite().all())
    return array.dtype.kind not in "fcV" or bool(np.isfinite(array).all())

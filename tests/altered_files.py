"""Change files temporarily while keeping their size and modification time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import load_file, save_file


@contextmanager
def altered(file: Path) -> Iterator[None]:
    """Add 0.5 to one number of a safetensors file, or change one letter of a text. Restore the file afterwards."""
    before, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    if file.suffix == ".safetensors":
        _add_a_half(file)
    else:
        file.write_bytes(_another_letter(before))
    assert file.stat().st_size == len(before) and file.read_bytes() != before
    os.utime(file, ns=times)
    try:
        yield
    finally:
        file.write_bytes(before)
        os.utime(file, ns=times)


def _add_a_half(file: Path) -> None:
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    arrays = {name: array.copy() for name, array in load_file(file).items()}
    name = min(name for name, array in arrays.items() if array.size and array.dtype.kind == "f")
    arrays[name].flat[0] += 0.5
    save_file(arrays, file, metadata)


def _another_letter(text: bytes) -> bytes:
    """Return the text with a space for a line's end, or another lower-case letter in a comment or prompt."""
    place = text.rindex(b"z")
    return text[:place] + b"y" + text[place + 1 :]

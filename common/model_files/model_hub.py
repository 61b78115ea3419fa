"""Read a model from this machine or from the hub, and say soon what is missing if there is no network."""

import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ray_ddpo.common.model_files.file_faults import fault_of
from ray_ddpo.common.recipe.named_files import Weights

T = TypeVar("T")


def read_from_hub(read: Callable[[bool], T], missing: str, source: str = "") -> T:
    """Read from the cache, or download.

    Args:
        read: called with `local_files_only`.
        missing: the beginning of the error.
        source: the hub name, which the user may have meant as a path.

    Raises:
        ValueError: `missing`, and why.
    """
    try:
        return read(True)
    except OSError:  # what transformers and the hub's client raise for anything missing
        if not hub_answers():
            raise ValueError(
                f"{missing} (it was not downloaded before, and the hub does not answer{_no_folder(source)})"
            ) from None
    try:
        return read(False)
    except OSError as error:
        raise ValueError(f"{missing} ({first_line(error)}{_no_folder(source)})") from None


def _no_folder(source: str) -> str:
    """Return a remark that a hub name is not a folder either, if its first half is a folder here."""
    folder = Path(source)
    return f"; there is no folder {folder.absolute()} either" if source and folder.parent.is_dir() else ""


def file_from_hub(repository: str, file: str, missing: str) -> str:
    """Return the path of one file of a repository. Raise ValueError, which begins with `missing`, if there is none."""
    from huggingface_hub import hf_hub_download

    def read(local_files_only: bool) -> str:
        return hf_hub_download(repository, file, local_files_only=local_files_only)

    return read_from_hub(read, missing, repository)


def read_pretrained(source: str, read: Callable[[str | Path, bool], T], missing: str) -> T:
    """Call `read(where, local_files_only)`, which uses transformers, for a folder or a hub name.

    If that is not possible, raise ValueError, which begins with `missing`.
    """
    folder = Path(os.path.expanduser(source))
    with errors_only():  # hide warnings about unneeded weights, such as another task's head
        if not folder.is_dir() and is_hub_name(source):
            return read_from_hub(lambda local_files_only: read(source, local_files_only), missing, source)
        try:
            return read(folder, True)
        except OSError as error:
            raise ValueError(f"{missing} ({first_line(error)})") from None


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence transformers except for errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def hub_answers(seconds: float | int = 5) -> bool:
    """Return whether the hub can be reached. Without a network, its own client retries for most of a minute."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and server_answers(constants.ENDPOINT, seconds)


def server_answers(url: str, seconds: float | int = 5) -> bool:
    """Return whether a server answers. A refusal is an answer, a server error (5xx) is none."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except urllib.error.URLError as error:
        # An untrusted certificate is an answer too; the hub's client may trust it.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def cannot_load(weights: Weights) -> str:
    """Return the error's text for missing files: which key names them, which files, and what to do without the hub."""
    return (
        f"{weights.key} is {weights.source!r}, which cannot be loaded: it must be a folder of this machine or a "
        f"repository of the hub that has {', '.join(weights.files)}; where the hub cannot be reached, copy them to "
        f"this machine, and set {weights.key} to where they are"
    )


def file_of(path: str | None, repository: str, file: str, key: str) -> Weights:
    """Return the user's own file at `path` or, if that is None, the repository's. The recipe's key for it is `key`."""
    if path is None:
        return Weights(repository, (file,), key)
    full_path = Path(os.path.expanduser(path)).absolute()
    return Weights(str(full_path.parent), (full_path.name,), key)


def missing_files(weights: Weights) -> list[str]:
    """Return the files that are not on this machine. Does not use the network."""
    folder = folder_here(weights)
    return [name for name in weights.files if folder is None or not any(folder.glob(name))]


def damaged_files(weights: Weights) -> list[str]:
    """Return the damaged files on this machine, each with the reason. Reads only their heads."""
    folder = folder_here(weights)
    names = weights.files if folder else ()
    faults = {path: fault_of(path) for name in names for path in sorted((folder or Path()).glob(name))}
    return [f"{path} is damaged ({fault})" for path, fault in faults.items() if fault]


def files_here(weights: Weights) -> dict[str, Path]:
    """Return the files that are on this machine, by path below the source. Does not use the network."""
    folder = folder_here(weights)
    found: dict[str, Path] = {}
    if folder is None:
        return found
    for name in weights.files:
        paths = [folder / name] if (folder / name).is_file() else sorted(folder.glob(name))
        found |= {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return found


def folder_here(weights: Weights) -> Path | None:
    """Return the folder on this machine with the files: the given folder, or a repository's download."""
    folder = Path(os.path.expanduser(weights.source))
    if folder.is_dir() or not is_hub_name(weights.source):
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(weights.source, weights.files[0])
    return Path(found).parent if isinstance(found, str) else None


def is_hub_name(name: str) -> bool:
    """Return whether `name` has the form owner/model rather than that of a path."""
    owner, _, model = name.partition("/")
    return owner not in ("", ".", "..", "~") and model != "" and "/" not in model


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without the advice that libraries add below."""
    return str(error).strip().partition("\n")[0]

"""Add up the upload of `ray job submit --working-dir .`; end with exit code 2 if Ray would refuse its size."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

LIMIT = 100 * 2**20  # bytes of one request to Ray's dashboard, which takes the archive uncompressed
MEBIBYTE = 2**20
LARGEST = 3  # files named in the error
NEVER, NEVER_VARIABLE = ".git,.venv,venv,__pycache__", "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"  # as in Ray
IGNORE_FILES = (".gitignore", ".rayignore")
Excluded = Callable[[Path], bool]


def uploaded(folder: Path, outer: tuple[Excluded, ...] = ()) -> Iterator[Path]:
    """Yield every file below `folder` that no .gitignore or .rayignore excludes, as Ray reads these files."""
    files = [folder / name for name in IGNORE_FILES if (folder / name).is_file()]
    excluded = (*outer, *(_matching(folder, file.read_text(encoding="utf-8").splitlines()) for file in files))
    for path in sorted(folder.iterdir()):
        if any(leaves_out(path) for leaves_out in excluded):
            continue
        if path.is_dir():
            yield from uploaded(path, excluded)
        elif path.is_file():
            yield path


def _matching(folder: Path, patterns: list[str]) -> Excluded:
    spec = _pathspec().PathSpec.from_lines("gitwildmatch", patterns)
    return lambda path: spec.match_file(str(path.relative_to(folder)))


def _pathspec() -> Any:
    """Return Ray's copy of pathspec without importing Ray, which takes a second."""
    ray = importlib.util.find_spec("ray")
    places = [str(Path(place) / "_private" / "thirdparty") for place in (ray and ray.submodule_search_locations) or ()]
    spec = PathFinder.find_spec("pathspec", places)
    if spec is None or spec.loader is None:
        raise SystemExit(
            "submit.sh: there is no Ray beside this Python: put .venv/bin on the PATH, which 'make demo' makes"
        )
    if "pathspec" not in sys.modules:
        sys.modules["pathspec"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["pathspec"])
    return sys.modules["pathspec"]


def too_large(folder: Path, limit: int = LIMIT) -> str | None:
    """Return an error message if the upload is too large, else None."""
    never = _matching(folder, os.environ.get(NEVER_VARIABLE, NEVER).split(","))
    sizes = sorted(((path.stat().st_size, path) for path in uploaded(folder, (never,))), reverse=True)
    total = sum(size for size, _ in sizes)
    if total < limit:
        return None
    named = ", ".join(f"{path.relative_to(folder)} ({size / MEBIBYTE:.0f} MiB)" for size, path in sizes[:LARGEST])
    return (
        f"the upload of {folder} has {total / MEBIBYTE:.0f} MiB, and Ray takes {limit / MEBIBYTE:.0f}: list the "
        f"largest files in .gitignore or .rayignore, or move them out: {named}"
    )


if __name__ == "__main__":
    if problem := too_large(Path.cwd()):
        print(f"submit.sh: {problem}", file=sys.stderr)
        sys.exit(2)

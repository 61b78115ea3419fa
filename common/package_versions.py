"""Versions of the libraries that decide what a run computes."""

import importlib.metadata

VERSIONED = ("ray-ddpo", "torch", "diffusers", "transformers", "peft", "ray", "numpy")


def package_version(package: str) -> str:
    """Return an installed package's version. This program has none if it runs from a clone without being installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from its source"

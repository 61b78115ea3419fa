"""Files that an entry of a recipe reads, named before anybody looks for them (no torch)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """Files that an entry of a recipe reads, from a folder of this machine or from what was downloaded of a repository."""

    source: str  # the folder, or owner/model
    files: tuple[str, ...]  # the first lies directly in it, by its name; the others may be patterns
    key: str  # of the recipe, that says where they are

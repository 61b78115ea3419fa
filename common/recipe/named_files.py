"""Names of the files that a component reads, known before any file is looked for (no torch)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """Files that a component reads, from a local folder or from the downloaded files of a repository."""

    source: str  # the folder, or owner/model
    files: tuple[str, ...]  # the first is a file directly in the source; the others may be patterns
    key: str  # the recipe's key that gives the source

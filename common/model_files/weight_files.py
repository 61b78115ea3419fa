"""What trained weights are called in a run's folder: by the name that their part has in diffusers' pipelines."""

from pathlib import Path

TRAINED_PARTS = ("unet", "transformer")  # a pipeline's network, by its family


def network_folder(path: Path) -> Path | None:
    """The folder of a whole network that was trained, in a run's folder; None: there is none."""
    return next((path / part for part in TRAINED_PARTS if (path / part).is_dir()), None)


def part_of(name: str) -> str | None:
    """The part that a LoRA file's weight belongs to; None: its name says nothing of that."""
    part = name.partition(".")[0]
    return part if part in TRAINED_PARTS else None

"""Names of trained weights in a run's folder, after the part's name in diffusers' pipelines."""

from pathlib import Path

TRAINED_PARTS = ("unet", "transformer")  # the network of a pipeline
SECOND_PART = "transformer_2"  # a further network, which is a submodule of that name where both are trained


def network_folder(path: Path) -> Path | None:
    """Return the folder of a fully trained network in a run's folder; None if there is none."""
    return next((path / part for part in TRAINED_PARTS if (path / part).is_dir()), None)


def stored_name(part: str | None, name: str) -> str:
    """Return the name in a LoRA file of a tensor in a network: the part and its name. A second network is a part itself."""
    return name if name.startswith(f"{SECOND_PART}.") else f"{part}.{name}"


def part_of(name: str) -> str | None:
    """Return the part that a LoRA tensor belongs to; None if its name has no part."""
    part = name.partition(".")[0]
    return part if part in TRAINED_PARTS else None

"""Refuse to use weights with another base model, rewards or prompts than they were trained on."""

from collections.abc import Sequence

from ray_ddpo.common.base_parts import Base, differing_parts
from ray_ddpo.common.diffusion.lora.files import EXACT_NAME, FILE_NAME
from ray_ddpo.common.model_files.weight_files import TRAINED_PARTS
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.driver.start import refusal

INSIDE_A_RUN = ("lora", "best", FILE_NAME, EXACT_NAME, *TRAINED_PARTS)
# Overrides of these keys ask for other rewards or prompts, so a difference is no fault.
ASKED_FOR = {"reward": ("reward", "rewards", "evaluation.scorers", "evaluation.suite"), "prompts": ("prompts",)}


def run_of(location: str) -> RunFolder | None:
    """Return the run that contains these weights or this recipe; None if there is none."""
    place = location.rstrip("/")
    for _ in range(4):
        folder = RunFolder(place)
        if folder.storage.exists(folder.recipe):
            return folder
        above, _, name = place.rpartition("/")
        if not above or name not in (*INSIDE_A_RUN, RunFolder.recipe):
            return None
        place = above
    return None


def check_base(run: RunFolder, now: Base, overrides: Sequence[str] = (), before: Base | None = None) -> None:
    """Compare the loaded files with those of a run, or with `before` if the run's files were others at that time.

    Raises:
        ValueError: a file differs, and no override asks for that.
    """
    keys = tuple(word.removeprefix("--") for word in overrides if word.startswith("--"))
    wanted = {
        table
        for table, named in ASKED_FOR.items()
        if any(key == name or key.startswith(f"{name}.") for key in keys for name in named)
    }
    told = differing_parts(run.base() if before is None else before, now)
    if differing := {name: said for name, said in told.items() if name.partition(".")[0] not in wanted}:
        raise ValueError(refusal(run.location, differing))


def check_given(weights: Sequence[str], named: str | None, now: Base, overrides: Sequence[str]) -> None:
    """Compare loaded files with the run whose recipe is used, and model files with the runs of the other weights.

    If the user names a recipe of another run, a different model is only reported.

    Raises:
        ValueError: a file differs.
    """
    runs = [run for run in map(run_of, weights) if run is not None]
    of_recipe = run_of(named) if named is not None else next(iter(runs), None)
    if of_recipe is not None:
        check_base(of_recipe, now, overrides)
    model = {name: part for name, part in now.items() if name.startswith("policy.")}
    for run in runs:
        if of_recipe is not None and run.location == of_recipe.location:
            continue
        if named is None:
            check_base(run, model)
        else:
            for said in differing_parts(run.base(), model).values():
                print_line(f"{run.location}: {said}, as --recipe {named} asks")

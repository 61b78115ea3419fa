"""ddpo scale: request another number of samplers or reward workers of an active run, through its folder."""

from ray_ddpo.common.recipe.reward_pools import SHARED, refused
from ray_ddpo.common.run_storage.lease import runs_it
from ray_ddpo.common.run_storage.run_folder import RunFolder


def scale(run: str, wanted: dict[str, int]) -> str:
    """Write the wanted numbers into the run's folder, which the driver reads about once a second.

    Args:
        run: the run's folder.
        wanted: number of actors by role.

    Returns:
        The request in words.

    Raises:
        ValueError: The run does not exist, is not active, has no such role, or does not allow the number.
    """
    folder = RunFolder(run)
    recipe = folder.load_recipe([])
    if not wanted:
        raise ValueError("ddpo scale needs --samplers N, --reward-workers N, or both")
    for role, count in wanted.items():
        if why := refused(recipe, role, count):
            raise ValueError(why)
    if runs_it(folder) is None:
        raise ValueError(f"no process runs {folder.location}: start it with --resume auto, and with --samplers.count")
    folder.ask(wanted)
    return "asked for " + " and ".join(f"{count} {role.replace('_', ' ')}" for role, count in wanted.items())


def counts_of(words: list[str]) -> dict[str, int]:
    """Return the wanted number of reward workers by pool: "2" is the shared pool, "aesthetic=2" that reward's own."""
    counts = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if not number.isdecimal():
            raise ValueError(f"--reward-workers is {word!r}: it must be a number, or NAME=N")
        counts[f"{SHARED}.{name}" if name else SHARED] = int(number)
    return counts

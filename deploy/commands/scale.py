"""ddpo scale: ask a living run for another number of samplers or reward workers, from any shell that sees its folder."""

from ray_ddpo.common.recipe.reward_pools import SHARED, elastic_roles, refused
from ray_ddpo.common.run_storage.lease import runs_it
from ray_ddpo.common.run_storage.run_folder import RunFolder


def scale(run: str, wanted: dict[str, int]) -> str:
    """Write what is wanted, by role, where the run's driver looks about once a second; what was asked, in words.

    ValueError: no run there, none alive, no such role, or a number outside its recipe's min … max.
    """
    folder = RunFolder(run)
    recipe = folder.load_recipe([])
    if not wanted:
        raise ValueError("ddpo scale needs --samplers N, --reward-workers N, or both")
    tables = elastic_roles(recipe)
    for role, count in wanted.items():
        if why := refused(tables, role, count):
            raise ValueError(why)
    if runs_it(folder) is None:
        raise ValueError(f"no process runs {folder.location}: start it with --resume auto, and with --samplers.count")
    folder.ask(wanted)
    return "asked for " + " and ".join(f"{count} {role.replace('_', ' ')}" for role, count in wanted.items())


def counts_of(words: list[str]) -> dict[str, int]:
    """How many reward workers are asked for, by pool: "2" of the shared one, "aesthetic=2" of that reward's own."""
    counts = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if not number.isdecimal():
            raise ValueError(f"--reward-workers is {word!r}: it must be a number, or NAME=N")
        counts[f"{SHARED}.{name}" if name else SHARED] = int(number)
    return counts

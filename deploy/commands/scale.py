"""ddpo scale: ask a living run for another number of samplers or reward workers, from any shell that sees its folder."""

from common.config import ElasticTable
from common.lease import runs_it
from common.run_folder import RunFolder


def scale(run: str, wanted: dict[str, int]) -> str:
    """Write what is wanted, by role, where the run's driver looks about once a second; what was asked, in words.

    ValueError: no run there, none alive, or a number outside its recipe's min … max.
    """
    folder = RunFolder(run)
    recipe = folder.load_recipe([])
    if not wanted:
        raise ValueError("ddpo scale needs --samplers N, --reward-workers N, or both")
    for role, count in wanted.items():
        table: ElasticTable = getattr(recipe, role)
        if count < table.min or (table.max is not None and count > table.max):
            raise ValueError(
                f"{role} is {count}: it must lie between {role}.min = {table.min} and {role}.max = {table.max or 'none'}"
            )
    if runs_it(folder) is None:
        raise ValueError(f"no process runs {folder.location}: start it with --resume auto, and with --samplers.count")
    folder.ask(wanted)
    return "asked for " + " and ".join(f"{count} {role.replace('_', ' ')}" for role, count in wanted.items())

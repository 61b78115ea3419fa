"""ddpo status: print the progress of a run, read from its folder alone, local or remote."""

from typing import Any

from ray_ddpo.common.metrics.diagnoses import NEEDED, bottleneck
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.lease import runs_it
from ray_ddpo.common.run_storage.reading import read_json_lines, read_text
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.driver.gpu_layout import roles_of

LATEST = "checkpoints/latest"
SHOWN = {
    "reward": ("reward/mean", ".4g"),
    "images a second": ("images_per_second", ".3g"),
    "seconds a round": ("seconds/round", ".3g"),
    "samplers": ("samplers/alive", ".0f"),
    "reward workers": ("reward_workers/alive", ".0f"),
    "samplers idle": ("idle/sampler", ".0%"),
    "reward workers idle": ("idle/reward_worker", ".0%"),
    "learner idle": ("idle/learner", ".0%"),
    "samplers' MFU": ("mfu/sampler", ".1%"),
    "learner's MFU": ("mfu/learner", ".1%"),
}
RATE = {"learning rate": ("learning_rate", ".3g")}


def status(run: str) -> dict[str, Any]:
    """Return the state of a run: its process, completed rounds, last metrics and newest checkpoint.

    `images_dropped` and `actor_restarts` are sums over the rounds in metrics.jsonl.

    Raises:
        ValueError: There is no run.
    """
    folder = RunFolder(run)
    recipe, storage = folder.load_recipe([]), folder.storage
    # Without a line that is still being written.
    rounds = read_json_lines(storage, folder.metrics, ("images_dropped",)) if storage.exists(folder.metrics) else []
    restarts = [value for metrics in rounds for name, value in metrics.items() if name.startswith("actor_restarts/")]
    return {
        "run": folder.location,
        "run_by": runs_it(folder),
        "rounds_done": len(rounds),
        "rounds": recipe.rounds,
        "checkpoint": read_text(storage, LATEST) if storage.exists(LATEST) else None,
        "ended_by_guard": folder.guard_ended(),
        "images_dropped": int(sum(metrics["images_dropped"] for metrics in rounds)),
        "actor_restarts": int(sum(restarts)),
        "last_round": {name: rounds[-1].get(name) for name, _ in _shown(recipe).values()} if rounds else {},
        "bottleneck": _bottleneck(rounds, recipe),
    }


def _shown(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Return the metrics to show, with their form; the learning rate if it changes during the run."""
    return SHOWN | (RATE if recipe.learner.rate_changes else {})


def _bottleneck(rounds: list[dict[str, Any]], recipe: Recipe) -> str | None:
    """Return the sentence that names the bottleneck on GPUs; None without them, or if rounds lack its metrics."""
    roles = roles_of(recipe)
    known = [values for values in rounds if all(values.get(name) is not None for name in NEEDED)]
    return bottleneck(known, roles) if roles.gpus and known else None


def in_words(known: dict[str, Any]) -> str:
    """Return the result of `status` as lines of text."""
    done = known["rounds_done"] == known["rounds"]
    ended = known["ended_by_guard"]
    inactive = "done" if done else "ended by the guard" if ended else "no process runs it; --resume auto resumes it"
    whose = f"run by {known['run_by']}" if known["run_by"] else inactive
    lines = {
        "rounds": f"{known['rounds_done']} of {known['rounds']}",
        "checkpoint": known["checkpoint"] or "none yet",
        "images dropped": str(known["images_dropped"]),
        "actor restarts": str(known["actor_restarts"]),
    }
    if ended:
        lines["guard"] = f"version {ended['policy_version']}: {'; '.join(ended['alarms'])}"
    last = known["last_round"]
    lines |= {
        name: format(last[key], form) for name, (key, form) in (SHOWN | RATE).items() if last.get(key) is not None
    }
    lines |= {"bottleneck": known["bottleneck"]} if known["bottleneck"] else {}
    width = max(map(len, lines))
    return "\n".join([f"{known['run']}: {whose}", *(f"{name:<{width}}  {value}" for name, value in lines.items())])

"""ddpo plan: print how a recipe's GPUs are shared by sampling and learning, and write the recipe with the best layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from ray_ddpo.common.balance import Layout, RoundLoad, layouts
from ray_ddpo.common.diffusion.memory.network_work import ASSUMED_BOTH
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import without_none
from ray_ddpo.deploy.commands.plan.layout import Candidate, candidates, layout_of
from ray_ddpo.deploy.commands.plan.numbers import Plan
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.gpu_layout import Keys, device_of, gpus_of, reward_gpus
from ray_ddpo.deploy.driver.round_work import ImageWork, image_work, round_load

RATE = 1e14  # operations a second: Stable Diffusion 1.5 on an H100 (docs/performance.md)
GIGABYTES = 80.0  # of a GPU, unless --gpu-memory says otherwise
SHOWN = 5  # layouts

Rows = list[tuple[str, str]]  # name and value


def balance_rows(components: Components, numbers: Plan) -> Rows:
    """Return the work per image, the expected idle shares of the recipe's own layout, and the best layout.

    A recipe without GPUs has the first of these rows only: its roles share cores, which num_gpus does not tell.
    """
    work = image_work(components, numbers.sizes)
    rows = [("work per image", work_in_words(work))]
    gpus = gpus_of(components.recipe)
    if device_of(components.recipe) == "cpu":
        return rows
    load = round_load(components, numbers.sizes, work, RATE)
    own = layout_of(components.recipe, load)
    rows.append(("this layout", f"{own.in_words}: {_expectation(own, work)}"))
    if gpus <= reward_gpus(components.recipe, gpus):  # by their shares, rewards leave no whole GPU to another layout
        return rows
    found = fastest(candidates(components, load, gpus, None))
    better = own.seconds / found.layout.seconds if found else 1.0
    if found is None or better < 1.01:
        return [*rows, (f"best split of {gpus} GPU{'s' * (gpus > 1)}", "this layout")]
    saying = f"{found.layout.in_words}: {_expectation(found.layout, work)}, {better:.2f} × the images a second"
    return [*rows, (f"best split of {gpus} GPU{'s' * (gpus > 1)}", f"{saying}; write it by --gpus {gpus}")]


def work_in_words(work: ImageWork) -> str:
    """Describe the operations per image."""
    if not work.is_counted:
        share = work.sampling / (work.sampling + work.learning)
        return (
            f"not counted for this family: taken as 1 for a forward pass, {ASSUMED_BOTH} with the backward pass and "
            f"{1 + ASSUMED_BOTH} with gradient checkpointing, so sampling is {share:.0%} of it"
        )
    parts = f"sampling {_tera(work.sampling)}, learning {_tera(work.learning)}"
    return f"{_tera(work.sampling + work.learning)} TFLOP: {parts}; scoring is not counted"


def fastest(found: list[Candidate]) -> Candidate | None:
    """Return the first candidate that fits; None if none does."""
    return next((candidate for candidate in found if candidate.misfit is None), None)


def balanced(components: Components, numbers: Plan, gpus: int, gigabytes: float) -> Candidate:
    """Return the fastest layout of `gpus` GPUs that fits in their memory.

    Raises:
        ValueError: there are no GPUs, or no layout fits.
    """
    if gpus < 1 or not gigabytes > 0:  # not a number is refused too
        raise ValueError(f"--gpus is {gpus} and --gpu-memory {gigabytes:g}: give one GPU or more, and their gigabytes")
    work = image_work(components, numbers.sizes)
    found = candidates(components, round_load(components, numbers.sizes, work, RATE), gpus, gigabytes)
    chosen = fastest(found)
    if chosen is None:
        memory = next((each.misfit for each in found if each.lacks_memory), None)
        advice = (
            "; policy.gradient_checkpointing, policy.offload and a smaller learner.micro_batch_size or "
            "sampling.batch_size need less memory"
        )
        why = f"{memory}{advice}" if memory else f"{found[0].misfit}"
        raise ValueError(f"no layout of {gpus} GPUs of {gigabytes:g} GB fits: {why}")
    return chosen


def proposal(components: Components, numbers: Plan, gpus: int, gigabytes: float) -> str:
    """Return the layouts of `gpus` GPUs as a table, and the lines of the best one for a recipe and a command line."""
    work = image_work(components, numbers.sizes)
    load = round_load(components, numbers.sizes, work, RATE)
    chosen = balanced(components, numbers, gpus, gigabytes)
    lines = [f"layouts of {gpus} GPU{'s' * (gpus > 1)} of {gigabytes:g} GB, the fastest first:"]
    for each in candidates(components, load, gpus, gigabytes)[:SHOWN]:
        fits = f"; does not fit: {each.misfit}" if each.misfit else ""
        lines.append(f"- {each.layout.in_words}: {_expectation(each.layout, work)}{fits}")
    lines += _left_out(load, components.recipe, gpus, chosen.layout)
    return "\n".join([*lines, "", fragment(chosen.keys), "", overrides(chosen.keys)])


def _left_out(load: RoundLoad, recipe: Recipe, gpus: int, chosen: Layout) -> list[str]:
    """Name the rank count of a faster layout that the recipe's batch sizes do not go with, and the key to change."""
    any_ranks = replace(load, images_per_step=0)  # 0 goes with every number of ranks
    free = layouts(any_ranks, gpus - reward_gpus(recipe, gpus), recipe.samplers.max)
    faster = free[0].seconds < 0.99 * chosen.seconds
    if not faster or load.allows(free[0].ranks):
        return []
    ranks, images = free[0].ranks, load.images_per_step
    if images % ranks:
        key = f"learner.batch_size × gradient_accumulation_steps, which is {images}, were a multiple of {ranks}"
    else:
        transitions = images // ranks * load.transitions_per_image
        key = f"learner.micro_batch_size, which is {load.micro_batch_size}, divided a rank's {transitions} transitions"
    return [f"({free[0].in_words} would be {chosen.seconds / free[0].seconds:.2f} × as fast if {key})"]


def fragment(keys: Keys) -> str:
    """Return the keys as lines of a recipe."""
    return tomli_w.dumps(keys).rstrip()


def overrides(keys: Keys) -> str:
    """Return the keys as words of a command line."""
    return " ".join(
        f"--{table}.{key} {_word(value)}" for table, values in keys.items() for key, value in values.items()
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_balanced(path: Path, recipe: Recipe, chosen: Candidate, gpus: int, gigabytes: float) -> Path:
    """Write the recipe with the chosen layout, and return its path. Raise ValueError if the file exists."""
    if path.exists():
        raise ValueError(f"--output is {path}, which exists: give the recipe a place of its own")
    tables: dict[str, Any] = without_none(recipe.model_dump(exclude_unset=True))
    for table, values in chosen.keys.items():
        tables[table] = {**tables.get(table, {}), **values}
    about = f"# For {gpus} GPU{'s' * (gpus > 1)} of {gigabytes:g} GB: {chosen.layout.in_words}.\n"
    path.write_text(about + tomli_w.dumps(tables), encoding="utf-8")
    return path


def _expectation(layout: Layout, work: ImageWork) -> str:
    """Describe idle shares, and seconds of a round at RATE if the work is counted."""
    idle = f"samplers idle {layout.idle_samplers:.0%}, learner idle {layout.idle_ranks:.0%}, GPUs idle "
    idle += f"{layout.idle_gpus:.0%}"
    return idle + (f", {layout.seconds:.3g} s a round at {RATE / 1e12:g} TFLOP/s a GPU" if work.is_counted else "")


def _tera(operations: float) -> str:
    return f"{operations / 1e12:.3g}"

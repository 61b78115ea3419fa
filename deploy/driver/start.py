"""Find where a run starts: from scratch, from its newest checkpoint or from an earlier run's weights; compare its files."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ray_ddpo.common.base_parts import MODEL_KEYS, Base, LoadedBase, differing_parts, entry_base, text_part
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.recipe.tables import StartFromTable
from ray_ddpo.common.run_storage.run_code import save_code
from ray_ddpo.common.run_storage.run_folder import BASE_FILE, RunFolder
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.input_image_checks import check_prompt_files
from ray_ddpo.deploy.driver.start_from import EarlierRun, earlier_run
from ray_ddpo.deploy.driver.suite_checks import suite_notes
from ray_ddpo.deploy.driver.warmup_note import warmup_note
from ray_ddpo.learner.checkpoints.checkpoint import (
    Checkpoint,
    committed_checkpoints,
    damaged_checkpoints,
    save_checkpoint,
)
from ray_ddpo.learner.checkpoints.resume import resume_point


@dataclass(frozen=True)
class Start:
    """The components, with the earlier run they start from; the checkpoint to resume from; the files loaded so far."""

    components: Components
    checkpoint: Checkpoint | None
    base: LoadedBase

    def write(self, folder: RunFolder) -> None:
        """Write recipe and fingerprints. Before them go an earlier run's weights, so that a resume needs that run no more."""
        if self.checkpoint and not self.checkpoint.rounds_done and not folder.storage.exists(folder.recipe):
            begun = replace(self.checkpoint, base=self.base.parts)
            save_checkpoint(folder.checkpoints, begun, self.components.recipe.checkpoint.keep)
        save_code(folder.storage, self.components.by_place())
        folder.write_recipe(self.components.resolved(), self.base.parts)


def start_of(folder: RunFolder, components: Components, resume: bool) -> Start:
    """Find where a run starts.

    Raises:
        ValueError: the run cannot start in this folder, with this recipe or prompts, or from this earlier run.
    """
    for note in (warmup_note(components), *suite_notes(components.recipe, components.prompts)):
        if note:
            print_line(f"note: {note}")
    check_prompt_files(components.recipe, components.policy, components.prompts)
    if folder.storage.exists(folder.recipe):
        return _resumed(folder, components, resume)
    _refuse_a_run_without_recipe(folder)
    table = components.recipe.start_from
    earlier = earlier_run(table, components) if table else None
    base = LoadedBase(earlier.base, _refusing_to_start(earlier)) if earlier else LoadedBase()
    base.take("the driver", prompts_base(components))
    if earlier is None:
        return Start(components, None, base)
    print(
        f"starts from {earlier.table.run} after round {earlier.table.round}, weights {earlier.weights.fingerprint[:12]}; "
        "optimizer state and statistics begin afresh",
        flush=True,
    )
    return Start(_starting_from(components, earlier.table), earlier.checkpoint, base)


def _refuse_a_run_without_recipe(folder: RunFolder) -> None:
    """Raise ValueError if the folder holds an earlier run's results: a new run would write over them."""
    # What a start writes before its recipe is no result: the weights that it starts from, round-000000.
    results = [name for name in committed_checkpoints(folder.checkpoints) if not name.startswith("round-000000")]
    there = [name for name in (folder.metrics,) if folder.storage.exists(name)] + results
    if there:
        raise ValueError(
            f"{folder.location} has {there[0]} and no {folder.recipe}, so the run is unknown: restore the file, "
            "or give another --name or --output_dir"
        )


def _refuse_damaged_checkpoints(folder: RunFolder) -> None:
    """Raise ValueError if every committed checkpoint is damaged: the run would silently start from scratch."""
    damaged = damaged_checkpoints(folder.checkpoints)
    if damaged:
        raise ValueError(
            f"the run in {folder.location} has no intact checkpoint, {', '.join(damaged)} is damaged: restore it, or remove "
            f"{folder.checkpoints.location} to begin again"
        )
    print_line(f"the run in {folder.location} has no checkpoint yet: it begins again")


def _resumed(folder: RunFolder, components: Components, resume: bool) -> Start:
    """Find where a run resumes. ValueError: its recipe or files have changed, or `resume` is not set."""
    if resume:
        before = folder.recipe_tables().get("start_from")
        components = _starting_from(components, _same_start(folder, before, components.recipe.start_from))
    checkpoint = resume_point(folder, components.resolved(), resume, set(_places(components)), components.defaults())
    if checkpoint is None:
        _refuse_damaged_checkpoints(folder)
    known = folder.base()
    if checkpoint and (differing := differing_parts(checkpoint.base, known)):
        said = "; ".join(differing.values())
        raise ValueError(
            f"{folder.location} has a checkpoint that was made with other files than {BASE_FILE} says: {said}"
        )
    base = LoadedBase(known, lambda differing: refusal(folder.location, differing, of_training=True))
    base.take("the driver", prompts_base(components))
    return Start(components, checkpoint, base)


def _same_start(folder: RunFolder, before: dict | None, now: StartFromTable | None) -> StartFromTable | None:
    """Return the earlier run that this run's own recipe names. It need not be given again, nor exist any more."""
    known = StartFromTable(**before) if before else None
    if now is None or now == known:
        return known
    if known is None or RunFolder(now.run).location != known.run or now.round not in (None, known.round):
        started = f"started from {known.run} after round {known.round}" if known else "did not start from another run"
        raise ValueError(
            f"the run in {folder.location} {started}, and --from now says {now.run}"
            f"{f'@{now.round}' if now.round else ''}: leave --from out, or give another --name"
        )
    return known


def _starting_from(components: Components, table: StartFromTable | None) -> Components:
    return replace(components, recipe=components.recipe.model_copy(update={"start_from": table}))


def _places(components: Components) -> Iterator[str]:
    """Yield the keys that say where files are; what is in the files is known by their fingerprints."""
    yield from (weights.key for weights in (*components.policy.files_of("sampler"), *components.policy.lora_files()))
    yield from (weights.key for weights in components.prompts.needs())
    several = bool(components.recipe.rewards)
    for place, table in enumerate(components.recipe.all_rewards):
        key = f"rewards.{place}" if several else "reward"
        yield from (weights.key.replace("reward", key, 1) for weights in components.rewards[table.called].needs())


def prompts_base(components: Components) -> Base:
    """Fingerprint the prompts: their file, the user's module, or the list itself."""
    source = components.prompts
    found = entry_base(source, "prompts", source.needs())
    if contents := source.input_contents():
        found["prompts.image_column"] = text_part("\n".join(contents), f"{len(contents)} input images")
    listed = source.listed()
    if not found and listed is not None:
        told = json.dumps([listed, source.held_out()])
        found["prompts"] = text_part(
            told, f"{len(listed)} prompts of prompts.name = {components.recipe.prompts.name!r}"
        )
    return found


def refusal(run: str, differing: dict[str, str], of_training: bool = False) -> str:
    """Say which parts are others than a run was made with, and what to do."""
    said = f"the run in {run} was made with other files than those here: {'; '.join(differing.values())}"
    if any(name.startswith(MODEL_KEYS) for name in differing):
        if not of_training:
            of_lora = not any(name.startswith("policy.model") for name in differing)
            where = "--policy.lora.path where the LoRA" if of_lora else "--policy.model where the model"
            return f"{said}; restore the file, or say with {where} is that the run was trained on"
        return f"{said}; restore the file, or begin a new run with another --name (--from takes weights to the same model only)"
    if not of_training:
        return f"{said}; restore the file, or name another one with a key of prompts, reward or evaluation"
    return f"{said}; restore the file, or start a new run from this one's weights: --from {run} and another --name"


def _refusing_to_start(earlier: EarlierRun) -> Callable[[dict[str, str]], str]:
    def refuse(differing: dict[str, str]) -> str:
        return (
            f"--from {earlier.table.run}: its weights were trained on another model: {'; '.join(differing.values())}; "
            "restore the file, or say with --policy.model where that model is"
        )

    return refuse

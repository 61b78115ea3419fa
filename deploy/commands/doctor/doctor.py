"""ddpo doctor: find what would go wrong with a recipe on this hardware, before a run."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.exceptions import GetTimeoutError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_ddpo.actors.evaluation.eval_set import build_eval_set
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RoleTable
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.deploy.commands.doctor.checks import (
    MADE_UP,
    authentication_finding,
    device_finding,
    disk_finding,
    folder_findings,
    push_findings,
    reward_findings,
    tracker_findings,
    version_findings,
    weights_findings,
)
from ray_ddpo.deploy.commands.doctor.guard import Finding, OutOfTime, guarded
from ray_ddpo.deploy.commands.doctor.ratio_measurement import runtime_of, sample_some, score_again
from ray_ddpo.deploy.commands.doctor.ratio_noise import (
    WIDEST,
    Noise,
    clip_range,
    noise_findings,
    table_rows,
    worst_in_words,
)
from ray_ddpo.deploy.commands.doctor.resources import (
    FreeMemory,
    Resources,
    cores_finding,
    memory_findings,
    place_findings,
    roles_of,
)
from ray_ddpo.deploy.commands.plan.numbers import Plan, in_bytes, plan_of_components
from ray_ddpo.deploy.driver.cluster import attach, attaches, check_temporary_folder
from ray_ddpo.deploy.driver.components import Components, build_reward, check_packages, components_of
from ray_ddpo.deploy.driver.input_image_checks import check_prompt_files
from ray_ddpo.deploy.driver.numerics_notes import rows_note
from ray_ddpo.deploy.driver.workers import place_options
from ray_ddpo.learner.algorithms.policy_gradient import PolicyGradient
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient
from ray_ddpo.learner.restart_check import tolerance_of

STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}
ACCELERATOR = "accelerator_type:"  # begins Ray's name of the resource
TRIED = 2  # images that a reward scores
MARK, SUBJECT, NUMBER_WIDTH = 9, 15, 7  # columns
At = Callable[..., Any]  # (role's table, function, arguments) -> its result, computed where the role's actors would run


@dataclass(frozen=True)
class MeasuredNoise:
    """Numerical noise of the ratio, and the algorithm's clip range to compare it with."""

    noise: Noise
    clip: float | None


def doctor(recipe: Recipe) -> int:
    """Print a line for each check. Return 1 if a check found a fault, else 0."""
    console, faults, warnings = Console(highlight=False), 0, 0
    for result in _examined(recipe):
        if isinstance(result, MeasuredNoise):
            _print_noise(console, result.noise, result.clip)
            continue
        _print(console, result)
        faults += result.level == "fault"
        warnings += result.level == "warning"
    counted = f"{faults} fault{'s' * (faults != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    console.print(f"\n{counted}: {'this will not work as it is' if faults else 'nothing stands in the way'}")
    return 1 if faults else 0


def _examined(recipe: Recipe) -> Iterator[Finding | MeasuredNoise]:
    """Yield findings as they are made, and the noise of the ratio if it could be measured."""
    yield from guarded("versions", version_findings)
    yield from guarded("device", lambda: [device_finding(recipe)])
    yield from guarded("run folder", folder_findings, recipe)
    yield from guarded("push", push_findings, recipe)
    yield from guarded("Ray's token", lambda: [authentication_finding(os.environ, Path.home())])
    built = list(guarded("recipe", lambda: [components_of(recipe)]))
    components = built[0]
    if isinstance(components, Finding):
        yield components
        return
    yield from guarded("trackers", tracker_findings, components.trackers)
    started_here = not ray.is_initialized()
    try:
        yield from _component_findings(components)
    finally:
        if started_here:
            ray.shutdown()


def _component_findings(components: Components) -> Iterator[Finding | MeasuredNoise]:
    """Check the recipe's components: first in this process, then where the actors would run."""
    prompts: list[Prompt] = []
    lacking = list(guarded("prompts", _prompt_findings, components, prompts))
    lacking += guarded("model", lambda: components.policy.check() or ())
    lacking += guarded("packages", lambda: check_packages(components) or ())
    yield from lacking
    if note := rows_note(components):
        yield Finding("warning", "batch rows", *note.split("; ", 1))
    planned = [] if lacking else list(guarded("plan", lambda: [plan_of_components(components)]))
    numbers = next((plan for plan in planned if isinstance(plan, Plan)), None)
    if numbers:
        yield from guarded("disk", lambda: [disk_finding(components.recipe, numbers)])
    else:
        yield from planned
    yield from guarded("cluster", _on_the_machines, components, numbers, tuple(prompts) or MADE_UP)


def _prompt_findings(components: Components, sampled: list[Prompt]) -> Iterator[Finding]:
    """Sample the prompts of run and evaluation, and append the first to `sampled`. Yields no finding."""
    check_prompt_files(components.recipe, components.policy, components.prompts)
    task = round_tasks(components.recipe, 0, components.prompts.load())[0]
    sampled += task.prompts[:TRIED]
    build_eval_set(components.recipe.evaluation, components.prompts)
    yield from ()


def _on_the_machines(
    components: Components, numbers: Plan | None, prompts: tuple[Prompt, ...]
) -> Iterator[Finding | MeasuredNoise]:
    """Check resources and memory, then try the components out.

    Without `numbers` (no model or prompts), do not sample.
    """
    recipe, attached = components.recipe, _attach()
    nodes: list[Resources] = [_this_machine(recipe)]
    if attached:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = list(place_findings(roles_of(recipe), nodes))
    yield from places
    yield _leftovers(recipe) if attached else cores_finding(recipe, os.cpu_count() or 1)
    if numbers:
        yield from [_memory_elsewhere(numbers)] if attached else memory_findings(recipe, numbers, _free_memory())
    homeless = ", ".join(place.subject for place in places if place.level == "fault")
    if homeless and attached:
        yield Finding("warning", "not looked at", f"weights and ratio: no place for {homeless}")
        return
    yield from _tried_out(
        components,
        _at_cluster(recipe) if attached else lambda table, function, *arguments: function(*arguments),
        prompts,
        numbers is not None and not homeless,
    )


def _tried_out(
    components: Components, at: At, prompts: tuple[Prompt, ...], may_sample: bool
) -> Iterator[Finding | MeasuredNoise]:
    """Load rewards and model, and measure the noise of the ratio, where the roles' actors would run."""
    try:
        yield from _reward_findings(components, at, prompts)
        weights = list(guarded("model", _model_findings, components, at))
        yield from weights
        if may_sample and weights[-1].level == "ok":
            yield from guarded("trial", _noise, components, at)
        else:
            yield Finding("warning", "not looked at", "the ratio: what is said above stands in the way of sampling")
    except OutOfTime:
        found = f"weights and ratio: not done in runtime.ready_seconds = {components.recipe.runtime.ready_seconds:g}"
        yield Finding("warning", "not looked at", found, "where the cluster is busy, try again when there is room")


def _reward_findings(components: Components, at: At, prompts: tuple[Prompt, ...]) -> Iterator[Finding]:
    """Try every reward and scorer."""
    recipe = components.recipe
    rewards = [("reward", table) for table in recipe.all_rewards]
    scorers = [("scorer", table) for table in recipe.scorers]
    for kind, table in rewards + scorers:
        workers = table.workers or recipe.reward_workers
        runtime = runtime_of(workers, recipe.runtime)
        yield from guarded(
            kind, at, workers, reward_findings, kind, table.called, build_reward(table), runtime, prompts
        )


def _model_findings(components: Components, at: At) -> Iterator[Finding]:
    lacking = at(components.recipe.samplers, weights_findings, "model", "the policy", components.policy.needs())
    yield from lacking or [Finding("ok", "model", f"the files of {components.policy.model} are there")]


def _noise(components: Components, at: At) -> Iterator[Finding | MeasuredNoise]:
    """Sample a few trajectories, score them again as the learner does, and compare."""
    recipe = components.recipe
    sampled = at(recipe.samplers, sample_some, recipe)
    if sampled.cut_prompts:
        yield Finding(
            "warning",
            "prompts",
            sampled.cut_prompts.removeprefix("prompts: "),
            "shorten them: truncated words have no effect",
        )
    noise = at(recipe.learner, score_again, recipe, sampled)
    clip = clip_range(components.algorithm, noise.latent_elements)
    yield MeasuredNoise(noise, clip)
    reads_log_probs = isinstance(components.algorithm, PolicyGradient)
    yield from noise_findings(noise, clip, recipe.sampling, reads_log_probs)
    if isinstance(components.algorithm, RewardGradient) and noise.restart_levels is not None:
        yield restart_finding(noise.restart_levels, tolerance_of(components.algorithm, components.policy))


def restart_finding(levels: float, tolerance: float) -> Finding:
    """Compare the difference of the learner's images from the sampler's with the tolerance of a run."""
    found = (
        f"the learner's last steps make the sampler's images within {levels:.2g} of {tolerance:g} accepted grey levels"
    )
    if levels <= tolerance:
        return Finding("ok", "restarts", found)
    found = f"the learner's last steps miss the sampler's images by {levels:.2g} grey levels, and {tolerance:g} are accepted"
    return Finding("fault", "restarts", found, "give sampler and learner the same dtype, or a larger restart_tolerance")


def _at_cluster(recipe: Recipe) -> At:
    """Return a function that runs another one with the resources of a role's actor.

    It raises OutOfTime if the call got no resources or did not end within `runtime.ready_seconds`, and RayError if its
    node died.
    """

    def run(table: RoleTable, function: Callable[..., Any], *arguments: Any) -> Any:
        options = place_options(table)
        if not table.num_gpus:  # hide the node's GPUs, as a role's actor does
            options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        done = ray.remote(max_retries=0, **options)(function).remote(*arguments)
        try:
            return ray.get(done, timeout=recipe.runtime.ready_seconds)
        except GetTimeoutError as error:
            raise OutOfTime from error

    return run


def _attach() -> bool:
    """Attach to the cluster of RAY_ADDRESS, if any; return whether this process is attached.

    Raises:
        ValueError: that cluster cannot be reached, or a cluster could not start here.
    """
    if ray.is_initialized():
        return True
    if attaches():
        attach(log_to_driver=False, logging_level=logging.ERROR)
        return True
    check_temporary_folder()
    return False


def _free_memory() -> FreeMemory:
    gpus = range(torch.cuda.device_count())
    return FreeMemory(psutil.virtual_memory().available, tuple(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus))


def _this_machine(recipe: Recipe) -> Resources:
    """Return the resources of a cluster started here: as many CPUs as the roles ask for, and this machine's GPUs."""
    roles = roles_of(recipe)
    cpus = sum(role.asks.get("CPU", 0) * role.count for role in roles)
    gpus = torch.cuda.device_count()
    names = " ".join(torch.cuda.get_device_name(index) for index in range(gpus))
    asked = {name for role in roles for name in role.asks if name.startswith(ACCELERATOR)}
    accelerators = {name: 1.0 for name in asked if name.removeprefix(ACCELERATOR) in names}
    return {"CPU": max(os.cpu_count() or 1, cpus), "GPU": gpus, **accelerators}


def _leftovers(recipe: Recipe) -> Finding:
    actors: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    ours = sorted(actor["name"] for actor in actors if actor["name"].startswith(f"{recipe.name}/"))
    if ours:
        found = f"the cluster has living actors of a run called {recipe.name}: {', '.join(ours)}"
        return Finding("warning", "leftovers", found, "see `ddpo status` whether it still runs; else stop its job")
    return Finding("ok", "leftovers", f"no actors of a run called {recipe.name} on the cluster")


def _memory_elsewhere(numbers: Plan) -> Finding:
    needs = {"learner": numbers.learner_bytes, "samplers": numbers.sampler_bytes, **numbers.reward_worker_bytes}
    store = ray.cluster_resources().get("object_store_memory", 0)
    found = "one of each: " + ", ".join(f"{role} {in_bytes(size)}" for role, size in needs.items())
    under_way = f"{in_bytes(numbers.round_bytes)} of trajectories, in stores of {in_bytes(int(store))}"
    if numbers.round_bytes > store:
        return Finding("warning", "memory", f"{found}; {under_way}", "it will spill to disk: lower batches_per_round")
    return Finding("ok", "memory", f"{found}; {under_way}")


def _print(console: Console, finding: Finding) -> None:
    mark = Text(f"{finding.level:<{MARK}}", STYLES[finding.level])
    console.print(mark, Text(f"{finding.subject:<{SUBJECT}} {finding.found}"), sep="", soft_wrap=True)
    if finding.advice:
        console.print(Text(" " * (MARK + SUBJECT) + f" → {finding.advice}"), soft_wrap=True)


def _print_noise(console: Console, noise: Noise, clip: float | None) -> None:
    """Print the table of ratio comparisons."""
    table = Table(box=None, pad_edge=False)
    table.add_column(
        "largest |log ratio|, scored again"
    )  # wraps on a narrow terminal, so that numbers are not truncated
    table.add_column("clip ranges", justify="right", min_width=NUMBER_WIDTH)
    table.add_column("nats", justify="right", min_width=NUMBER_WIDTH)
    table.add_column("step by step", no_wrap=True, min_width=min(WIDEST, noise.of_the_run.log_ratios.shape[1]))
    for row in table_rows(noise, clip):
        table.add_row(*row)
    console.print()
    console.print(table)
    if noise.unavailable:
        console.print(f"not to be had on {noise.device}: {', '.join(noise.unavailable)}", style="dim")
    console.print(f"{worst_in_words(noise, clip)}\n", soft_wrap=True)

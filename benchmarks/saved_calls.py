"""make saved-calls: what caches, solvers, fewer steps, other numbers and shared prefixes do to images and time.

The embedded model samples its held-out images in each setting, with the same prompts and noise. Each setting is
compared with the plain one image by image, and with nearly exact images of many steps.
"""

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from benchmarks.timing import machine
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.rollout import SharedPrefix, sample_trajectories
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.runtime import settle
from ray_ddpo.common.trajectory import Trajectory
from ray_ddpo.deploy.driver.components import Components, build_components
from ray_ddpo.deploy.evaluation.eval_result import EvalResult, EvalScorer

RECIPE = "deploy/recipes/tiny/window.toml"
PLAIN, EXACT = "plain, 15 steps", "dpmsolver++, 60 steps"
BRANCHES = 2  # rows of the network for each image: with and without the prompt
SHOWN = 12  # images of the contact sheet
HALF = ["--policy.sampler_dtype", "bfloat16", "--algorithm.off_policy.ratio", "proximal"]
FLOAT8 = ["--policy.sampler_storage", "float8_e4m3fn", "--algorithm.off_policy.ratio", "proximal"]
SETTINGS: dict[str, list[str]] = {
    PLAIN: [],
    EXACT: ["--evaluation.solver", "dpmsolver++", "--evaluation.num_steps", "60"],
    "8 steps": ["--evaluation.num_steps", "8"],
    "6 steps": ["--evaluation.num_steps", "6"],
    "cache_interval 2": ["--evaluation.cache_interval", "2"],
    "cache_interval 3": ["--evaluation.cache_interval", "3"],
    "dpmsolver++, 15 steps": ["--evaluation.solver", "dpmsolver++"],
    "dpmsolver++, 8 steps": ["--evaluation.solver", "dpmsolver++", "--evaluation.num_steps", "8"],
    "dpmsolver++, 6 steps": ["--evaluation.solver", "dpmsolver++", "--evaluation.num_steps", "6"],
    "sampler in bfloat16": HALF,
    "the same, adapters merged": [*HALF, "--policy.merge_adapters", "true"],
    "weights stored in float8": FLOAT8,
}
GROUP, WINDOW = 8, 4
WINDOWS = (4, 9)  # first steps of windows whose prefix is shared, or not


@dataclass(frozen=True)
class Setting:
    """One setting with its policy, its held-out images with their scores, and what they cost."""

    components: Components
    policy: Policy
    result: EvalResult
    calls: float  # of the network for each image
    seconds: float  # of the processor, for sampling, decoding and scoring all images


def measured(policy: Policy, work: Callable[[], Any]) -> tuple[Any, int, float]:
    """Return the result of `work`, the rows that the network computed, and the processor's seconds.

    The processor's time counts, because other programs may share the machine.
    """
    rows: list[int] = []
    handle = policy.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    start = time.process_time()
    result = work()
    taken = time.process_time() - start
    handle.remove()
    return result, sum(rows), taken


def setting_of(overrides: list[str]) -> Setting:
    """Load a policy, and sample and score its held-out images."""
    components = build_components(Recipe.load(RECIPE, overrides))
    torch.manual_seed(components.recipe.seed)
    policy = components.policy.load(settle(components.recipe.runtime), components.recipe.sampling, "sampler")
    if policy.merged:
        policy.merged.merge()
    scorer = EvalScorer(components)
    result, rows, taken = measured(policy, lambda: scorer.evaluate(policy, " ".join(overrides)))
    return Setting(components, policy, result, rows / (BRANCHES * len(result.seeds)), taken)


def pixel_difference(ours: UInt8[np.ndarray, "N H W 3"], theirs: UInt8[np.ndarray, "N H W 3"]) -> float:
    """Return the mean absolute difference of pixels, 0 to 255."""
    return float(np.abs(ours.astype(np.int16) - theirs.astype(np.int16)).mean())


def diversity(pixels: UInt8[np.ndarray, "N H W 3"], group: int) -> float:
    """Return the mean standard deviation of a pixel within groups of neighbouring images, 0 to 255."""
    return float(pixels.astype(np.float32).reshape(-1, group, *pixels.shape[1:]).std(axis=1).mean())


def held_out_row(name: str, each: Setting, plain: Setting, exact: Setting) -> str:
    """Return a setting's Markdown row, compared image by image with the plain and the nearly exact images."""
    reward = next(score for score in plain.result.scores if score != "animal_classifier")
    change = each.result.scores[reward] - plain.result.scores[reward]
    error = change.std(ddof=1) / len(change) ** 0.5
    return (
        f"| {name} | {each.calls:.0f} | {plain.seconds / each.seconds:.2f} × "
        f"| {pixel_difference(each.result.pixels, plain.result.pixels):.2f} "
        f"| {pixel_difference(each.result.pixels, exact.result.pixels):.2f} "
        f"| {change.mean():+.4f} ± {error:.4f} | {each.result.scores['animal_classifier'].mean():.3f} |"
    )


def branched_rows(setting: Setting) -> list[str]:
    """Return a Markdown row for each window of a training task of two groups, with the prefix shared or not."""
    policy, sampling = setting.policy, setting.components.recipe.sampling
    animals, seeds = setting.components.prompts.listed()[:2], list(range(2 * GROUP))
    prompts = [animals[seed // GROUP] for seed in seeds]
    prefix = SharedPrefix(tuple(seed // GROUP * GROUP for seed in seeds), groups=2)

    def sample(start: int, shared: bool) -> Trajectory:
        window = range(start, start + WINDOW)
        return sample_trajectories(policy, prompts, seeds, sampling, window, prefix if shared else None)

    rows = []
    for start in WINDOWS:
        apart, shared = (measured(policy, functools.partial(sample, start, each)) for each in (False, True))
        for kind, (trajectory, calls, taken) in {"of each image": apart, "shared": shared}.items():
            spread = diversity(policy.decode(trajectory.final_latents).numpy(), GROUP)
            name = f"window of {WINDOW} from step {start}, prefix {kind}"
            each = calls / (BRANCHES * len(seeds))
            rows.append(f"| {name} | {each:.2f} | {apart[2] / taken:.2f} × | {spread:.1f} |")
    return rows


def contact_sheet(settings: dict[str, Setting]) -> UInt8[np.ndarray, "H W 3"]:
    """Return the first images of all settings, one row a setting."""
    rows = [np.concatenate(list(each.result.pixels[:SHOWN]), axis=1) for each in settings.values()]
    return np.concatenate(rows, axis=0)


def main() -> None:
    """Measure all settings and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=90)
    parser.add_argument("--sheet", type=Path, help="where to put the first images of each setting, a row each")
    given = parser.parse_args()
    fixed = ["--evaluation.images", str(given.images), "--runtime.threads", "1"]
    print(f"{machine()}; {given.images} held-out images of evaluation.seed 0; one thread; processor's time\n")
    print("| setting | network calls an image | speed | pixels from plain | from 60 steps | reward | named |")
    print("|---|---|---|---|---|---|---|", flush=True)
    settings: dict[str, Setting] = {}
    for name, overrides in SETTINGS.items():
        settings[name] = setting_of([*fixed, *overrides])
        if EXACT in settings:
            shown = settings if name == EXACT else [name]
            for each in shown:
                print(held_out_row(each, settings[each], settings[PLAIN], settings[EXACT]), flush=True)
    print(
        "\n| training task of 2 groups of 8 | network calls an image | speed | deviation in a group |\n|---|---|---|---|"
    )
    print(*branched_rows(settings[PLAIN]), sep="\n", flush=True)
    if given.sheet:
        Image.fromarray(contact_sheet(settings)).save(given.sheet)


if __name__ == "__main__":
    main()

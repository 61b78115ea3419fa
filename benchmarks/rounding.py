"""Print the difference between bfloat16 samplers and a float32 learner under each choice of a processor's kernels.

Each choice runs in a separate process, because libraries read these variables once. The embedded model is sampled in
bfloat16. One batch of its transitions is then scored twice: in the sampler's numerics, where the bits must be equal,
and in float32.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.diffusion.lora.adapters import read_weights
from ray_ddpo.common.machine import this_machine
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import Trajectory
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.round_data.transitions import round_transitions
from ray_ddpo.learner.weight_check import log_prob_differences, rows_to_check

RECIPE = Path(__file__).parents[1] / "deploy/recipes/tiny/jpeg.toml"
KERNELS = (
    {},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
)


def measured(folder: Path) -> dict[str, str | float]:
    """Return the processor's name, and the largest difference of log-probs in both numerics, on the mean scale."""
    keys = {"policy.sampler_dtype": "bfloat16", "algorithm.off_policy.ratio": "proximal", "output_dir": str(folder)}
    recipe = Recipe.load(RECIPE, [word for key, value in keys.items() for word in (f"--{key}", value)])
    components = build_components(recipe)
    torch.manual_seed(0)
    learner = components.policy.load("cpu", recipe.sampling, "learner")
    sampler = Sampler(components.policy, recipe.sampling, recipe.runtime)
    weights = read_weights(learner.network, 0)
    task = round_tasks(recipe, 0, components.prompts.load())[0]
    trajectory = sampler.sample(task, weights)[1]
    assert isinstance(trajectory, Trajectory)
    copy = components.policy.load("cpu", recipe.sampling, "check")
    copy.load_weights(weights)
    images = len(task.seeds)
    transitions = round_transitions((trajectory,), torch.zeros(images).numpy(), "cpu")
    (rows,) = rows_to_check(transitions, (), images)
    alike, apart = (float(log_prob_differences(policy, transitions, rows).max()) for policy in (copy, learner))
    return {"processor": this_machine("cpu").processor, "alike": alike, "apart": apart}


def main() -> None:
    """Print a row for each choice of kernels."""
    if sys.argv[1:] == ["--here"]:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measured(Path(folder))))
        return
    print(f"{'kernels':<32} {'computed alike':>14} {'bfloat16, float32':>18}  processor")
    for chosen in KERNELS:
        command = [sys.executable, "-m", "benchmarks.rounding", "--here"]
        ran = subprocess.run(command, env=os.environ | chosen, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(ran.stdout.splitlines()[-1])
        name = " ".join(f"{key}={value}" for key, value in chosen.items()) or "the processor's own"
        print(f"{name:<32} {found['alike']:>14.2g} {found['apart']:>18.2g}  {found['processor']}", flush=True)


if __name__ == "__main__":
    main()

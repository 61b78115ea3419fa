"""Measure the difference between sampler's and learner's log-probs on this device for each way of running both.

Usage: python -m benchmarks.gpu_noise RECIPE ANSWERS.jsonl [--override value …]. Each way appends one line.
"""

import json
import sys
from pathlib import Path

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.doctor.ratio_measurement import sample_some, score_again

PROXIMAL = ["--algorithm.off_policy.ratio", "proximal"]  # the others are refused by a recipe otherwise
WAYS = {
    "both eager": [],
    "both compiled": ["--policy.compile", "both"],
    "sampler merged": ["--policy.merge_adapters", "true"],
}
SHORTER = ["--sampling.num_steps", "10"]


def main(recipe: str, answers: str, overrides: list[str]) -> None:
    """Sample as the sampler and score as the learner, in every way."""
    for way, words in WAYS.items():
        of_this_way = Recipe.load(recipe, [*overrides, *SHORTER, *PROXIMAL, *words])
        noise = score_again(of_this_way, sample_some(of_this_way))
        found = {each.name: [each.kind, each.largest] for each in noise.comparisons}
        with Path(answers).open("a") as file:
            file.write(json.dumps({"way": way, "latent_elements": noise.latent_elements, "largest": found}) + "\n")
        print(f"{way}: largest |log ratio| {noise.of_the_run.largest:.2g}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

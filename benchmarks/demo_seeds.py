"""make demo-seeds: train the demo with several run seeds and print one line per seed and the worst change.

`--image docs/before_after.png` writes a small copy of the first seed's comparison for the front page.
Numbers of a recipe are chosen with other seeds and other images: `--seeds 10 11 --evaluation.split tuning …`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.small_copy import small_copy
from benchmarks.timing import machine

RECIPE = "deploy/recipes/demo.toml"
IMAGE_WIDTH = 900  # pixels, of the image on the front page


def run(recipe: str, seed: int, folder: Path, overrides: list[str]) -> dict:
    """Train and report in processes of their own, as a user would; the report's figures."""
    name = f"{Path(recipe).stem}-seed{seed}"
    placed = ["--seed", str(seed), "--name", name, "--output_dir", str(folder), *overrides]
    for command in (["train", recipe, *placed], ["report", str(folder / name)]):
        subprocess.run([sys.executable, "-m", "ray_ddpo", *command], check=True, stdout=sys.stderr)
    return json.loads((folder / name / "report" / "summary.json").read_text())


def line(seed: int, figures: dict) -> tuple[float, str]:
    """Return the relative change of the reward, and the seed's row of the table."""
    change = figures["reward_after"] - figures["reward_before"]
    share = change / abs(figures["reward_before"])
    errors = change / figures["paired_standard_error"]
    probe = figures["scorers"].get("named") or figures["scorers"].get("animal_classifier", {})
    named = f"{probe.get('before', 0):.2f} → {probe.get('after', 0):.2f}, kept {probe.get('kept', 0):.2f}"
    before, after = figures["reward_before"], figures["reward_after"]
    rewards = f"{before:.3f} → {after:.3f} | {100 * share:+.1f} % | {errors:.1f}"
    return share, f"| {seed} | {rewards} | {named} | {figures['seconds']:.0f} | {figures['fingerprint'][:12]} |"


def main() -> None:
    """Print the table. Unknown options override the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--image", type=Path, help="where to write a small copy of the first seed's before/after image")
    options, overrides = parser.parse_known_args()
    print(f"{machine()}; {' '.join(overrides)}\n")
    print("| seed | reward before → after | change | paired standard errors | named | seconds | fingerprint |")
    print("|---|---|---|---|---|---|---|", flush=True)
    lines = []
    for seed in options.seeds:
        lines.append(line(seed, run(options.recipe, seed, options.folder, overrides)))
        print(lines[-1][1], flush=True)
    if options.image:
        report = options.folder / f"{Path(options.recipe).stem}-seed{options.seeds[0]}" / "report"
        small_copy(report / "before_after.png", options.image, IMAGE_WIDTH)
    print(f"\nworst: {100 * min(lines)[0]:+.1f} %")


if __name__ == "__main__":
    main()

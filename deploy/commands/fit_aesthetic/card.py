"""Summary of an aesthetic head for the terminal, and its model card."""

import json
import platform
from pathlib import Path
from typing import Any

from ray_ddpo.common.package_versions import package_version

VERSIONED = ("ray-ddpo", "torch", "transformers", "numpy", "pillow")
KINDS = {
    "linear": "one linear layer, fitted by ridge regression",
    "mlp": "1024-128-64-16 with dropout and without activations, the layout of improved-aesthetic-predictor",
    "mlp-relu": "1024-128-64-16 with ReLU and dropout, the layout of improved-aesthetic-predictor's reluMSE",
}
FIGURES = {"images": "d", "mse": ".4f", "mse_of_mean": ".4f", "srcc": ".4f", "plcc": ".4f"}


def versions() -> dict[str, str]:
    """Return the versions that decide the head's bits."""
    return {"python": platform.python_version()} | {name: package_version(name) for name in VERSIONED}


def recipe_lines(clip: str, head: str) -> str:
    """Return the recipe table that uses the head as a reward."""
    return f'[reward]\nname = "aesthetic"\nclip = {json.dumps(clip)}\nhead = {json.dumps(head)}'


def in_words(figures: dict[str, Any], output: Path) -> str:
    """Format the summary for the terminal."""
    lines = [
        f"{figures['head']} head on {figures['images']} rated images; {_chosen(figures)}",
        f"broken images: {figures['broken']}" + (f", listed in {output / 'broken.csv'}" if figures["broken"] else ""),
        "",
        f"{'':<12}" + "".join(f"{name:>13}" for name in FIGURES),
    ]
    lines += [f"{split:<12}" + "".join(f"{cell:>13}" for cell in row) for split, row in _rows(figures).items()]
    files = ("head.safetensors", "metrics.json", "calibration.png", "README.md")
    lines += ["", "look at:", *(f"  {output / name}" for name in files), "", "use it in a recipe:", ""]
    return "\n".join([*lines, recipe_lines(figures["clip"], str(output / "head.safetensors"))])


def model_card(figures: dict[str, Any]) -> str:
    """Return README.md of the output folder, in the format of model hubs."""
    rows = "\n".join(f"| {split} | {' | '.join(row)} |" for split, row in _rows(figures).items())
    mean, std, least, most = (figures["ratings"][name] for name in ("mean", "std", "min", "max"))
    used = "\n".join(f"| {name} | {version} |" for name, version in figures["versions"].items())
    return f"""---
license: # fill in, as the licenses of the ratings, of the images and of CLIP allow
tags: [aesthetic-predictor, clip, ray-ddpo]
---

# Aesthetic head

Rates an image from its CLIP embedding. Fitted by `ddpo fit-aesthetic`.

| | |
|---|---|
| ratings | `{figures["table"]}`: {figures["images"]} images; {figures["broken"]} more were broken |
| their distribution | mean {mean:.3f}, standard deviation {std:.3f}, from {least:.2f} to {most:.2f} |
| CLIP | `{figures["clip"]}`, fingerprint `{figures["clip_fingerprint"]}` |
| head | `{figures["head"]}`: {KINDS[figures["head"]]} |
| chosen | {_chosen(figures)} |
| seed | {figures["seed"]} |

## How well it rates

| split | {" | ".join(FIGURES)} |
|---|{"---|" * len(FIGURES)}
{rows}

`mse_of_mean` is the error of rating every image with the mean; `srcc` and `plcc` are the correlations of ranks and of
values. The validation images selected the fit, so only the test images give an unbiased estimate.

![Predicted against true ratings](calibration.png)

## How to use it

```toml
{recipe_lines(figures["clip"], "head.safetensors")}
```

`clip` must be the same CLIP as above, and `head` the path of this folder's `head.safetensors`. Its ratings are not
meaningful for images unlike those of its training set, and a policy trained on it finds such images (reward hacking):
look at them, and compare with a second reward.

## Versions

| | |
|---|---|
{used}
"""


def _rows(figures: dict[str, Any]) -> dict[str, list[str]]:
    return {
        split: ["–" if values[name] is None else format(values[name], form) for name, form in FIGURES.items()]
        for split, values in figures["splits"].items()
    }


def _chosen(figures: dict[str, Any]) -> str:
    ((name, value),) = figures["chosen"].items()
    return f"{name} {value:g} of {len(figures['tried'])}, by the validation images"

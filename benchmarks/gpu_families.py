"""make bench-gpu-families: measure a round of SDXL and of SD 3.5 medium with random weights on one GPU.

Needs neither network nor Ray: `python -m benchmarks.gpu_families`. The architectures are the published ones without T5
(`policy.t5 = false`). `--tiny --device cpu` runs the same code anywhere.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_stable_diffusion import SCHEDULER, fill
from benchmarks.round_process import RoundProcess
from benchmarks.timing import machine
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import meta_parts
from ray_ddpo.common.diffusion.policy import quiet_libraries
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import components_of
from tests.tiny_families import KEYS, MAKERS
from tests.tiny_pipeline import tiny_tokenizer

RECIPES = {"sdxl": "families/sdxl_aesthetic.toml", "sd3": "families/sd35_medium_pickscore.toml"}
COLUMNS = ("family", "images", "steps", "sampling s", "learning s", "images/s", "peak, GB", "predicted, GB")


def save_random_family(folder: Path, config: DiffusersConfig) -> Path:
    """Save the recipe's pipeline with random weights in the recipe's dtype. Equal calls give equal weights."""
    quiet_libraries()
    import diffusers

    configs = {part: config.part_config(part) for part in (config.network_name, "vae", *config.text_parts)}
    letters = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    parts: dict[str, Any] = meta_parts(
        config, {part: keys | letters if part in config.text_parts else keys for part, keys in configs.items()}
    )
    for seed, part in enumerate(parts.values()):
        fill(part.to(config.loaded_dtype).to_empty(device="cpu"), seed)
        for buffer in part.buffers():  # position tables; buffers that are not saved are re-computed at load
            buffer.zero_()
    absent = {part: None for part, value in config.loading.items() if value is None}
    length = configs["text_encoder"]["max_position_embeddings"]
    tokenizers = {name: tiny_tokenizer(length) for name in config.tokenizers if name not in absent}
    if config.scheduler_class:
        scheduler = diffusers.DDIMScheduler(**SCHEDULER)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline_class: Any = getattr(diffusers, config.pipeline_class)
    pipeline = pipeline_class(**parts, **tokenizers, **absent, scheduler=scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def overrides_of(family: str, model: Path, options: argparse.Namespace) -> list[str]:
    """Return overrides of the family's recipe: this model, two tasks a round, one optimizer step on all images."""
    batch = 2 if options.tiny else 4
    values: dict[str, Any] = {
        "max_policy_lag": 0,
        "policy.model": model,
        "reward.name": "jpeg_compressibility",
        "evaluation.every": 0,
        "sampling.num_steps": 4 if options.tiny else 10,
        "sampling.batch_size": batch,
        "sampling.batches_per_round": 2,
        "prompts.images_per_prompt": 2,
        "algorithm.kl_coef": 0.0,
        "learner.world_size": 1,
        "learner.batch_size": 2 * batch,
        "learner.micro_batch_size": 2 if options.tiny else batch,
        "runtime.device": options.device,
        "runtime.threads": 1 if options.tiny else 8,
    }
    values |= {"policy.t5": "false"} if family == "sd3" else {}
    if options.tiny:
        values |= {f"policy.{key}": value for key, value in KEYS.get(family, {}).items()}
        values |= {"policy.dtype": "float32"} | ({"policy.resolution": 16} if family == "sd3" else {})
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def measured(family: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time a second round, and add the plan's memory for sampler and learner in one process."""
    recipe_path = f"deploy/recipes/{RECIPES[family]}"
    model = options.folder / family
    recipe = Recipe.load(recipe_path, overrides_of(family, model, options))
    config: Any = components_of(recipe).policy
    if not model.exists():
        published = components_of(Recipe.load(recipe_path, ["--policy.t5", "false"] if family == "sd3" else [])).policy
        MAKERS[family](model) if options.tiny else save_random_family(model, published)
    sizes = config.sizes(recipe.sampling, "cuda" if options.device == "cuda" else "cpu")
    learning = sizes.learner.of(recipe.learner.micro_batch_size) + sizes.sampling.fixed
    predicted = max(learning, sizes.learner.fixed + sizes.sampler_bytes(recipe.sampling.batch_size))
    job = options.folder / f"{family}.json"
    job.write_text(json.dumps({"recipe": recipe_path, "overrides": overrides_of(family, model, options)}))
    process = RoundProcess([sys.executable, "-m", "benchmarks.our_rounds", str(job)], job.with_suffix(".log"))
    try:
        process.answer()
        process.ask()
        row = process.ask()
    finally:
        process.close()
    numbers = (recipe.images_per_round, recipe.sampling.num_steps, row["sampling"], row["learning"])
    rate = recipe.images_per_round / row["round"]
    return dict(zip(COLUMNS, (family, *numbers, rate, row["peak_bytes"] / 1e9, predicted / 1e9), strict=True))


def main() -> None:
    """Measure and print a table. Each row is stored as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu_families"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models: the same way on any machine")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for family in options.only:
        row = measured(family, options)
        with (options.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join([*lines, "", machine()]))


if __name__ == "__main__":
    main()

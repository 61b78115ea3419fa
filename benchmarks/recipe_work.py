"""Print the floating-point operations of shipped recipes per image, as `ddpo plan` counts them.

`python -m benchmarks.recipe_work` prints the numbers of docs/model_families.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ray_ddpo.common.diffusion.memory.sizes_cache import sizes_cache
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.plan.balance import RATE
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.deploy.driver.gpu_layout import device_of
from ray_ddpo.deploy.driver.round_work import image_work

RECIPES = Path(__file__).parents[1] / "deploy" / "recipes"
NAMES = (
    "sd15_aesthetic",
    "families/sd14_refl_imagereward",
    "families/sd15_draft_aesthetic",
    "families/sd15_alignprop_aesthetic",
    "families/sd15_offline_dpo",
    "families/sd21_aesthetic",
    "families/sdxl_aesthetic",
    "families/sdxl_full",
    "families/sd35_medium_pickscore",
    "families/sd35_medium_comparison",
    "families/sd35_medium_window",
    "families/sd35_medium_grpo_guard",
    "families/sd35_medium_flow_dppo",
    "families/sd35_medium_nft",
    "families/sd35_medium_awm",
    "families/sd35_medium_dgpo",
    "families/sd35_medium_dpo",
    "families/sd35_medium_sft",
    "families/flux_dev_pickscore",
    "families/flux_dev_dance",
    "families/flux_dev_mixgrpo",
    "families/flux_kontext_edit",
    "families/qwen_image_window",
    "families/qwen_image_edit_window",
    "families/flux2_dev_sharded",
    "families/flux2_klein_window",
    "families/flux2_klein_edit",
    "families/z_image_window",
    "families/z_image_turbo_window",
    "families/hunyuan_image_window",
    "families/lumina2_window",
    "families/sana_1600m_window",
    "families/pixart_sigma_aesthetic",
    "families/wan21_1_3b_window",
    "families/wan22_a14b_sharded",
    "families/wan22_a14b_both",
    "families/wan22_i2v_sharded",
    "families/wan22_5b_i2v_window",
    "families/ltx_2b_window",
)


def operations(recipe: Recipe) -> float:
    """Return the operations per image of sampling and learning, without decoding and scoring."""
    components = build_components(recipe)
    with sizes_cache():
        work = image_work(components, components.policy.sizes(recipe.sampling, device_of(recipe)))
    assert work.is_counted, f"{recipe.name} cannot be counted"
    return work.sampling - work.decoding + work.learning


def main(names: Sequence[str]) -> None:
    """Print the table's last two columns."""
    for name in names or NAMES:
        recipe = Recipe.load(RECIPES / f"{name}.toml", [])
        flops = operations(recipe)
        hours = flops * recipe.images_per_round * recipe.rounds / RATE / 3600
        print(f"{name}.toml: {flops / 1e12:,.0f} TFLOP an image, {hours:.0f} GPU-hours", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

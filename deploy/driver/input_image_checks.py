"""Refuse recipes whose prompts and model family do not agree on input images."""

from collections.abc import Sequence

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.prompts import Prompt, PromptList, PromptSource, refuse_more_inputs
from ray_ddpo.common.recipe.recipe import Recipe


def check_input_images(recipe: Recipe, policy: PolicyConfig, source: PromptSource) -> None:
    """Check that prompts have the input images that the family reads, and no others.

    Raises:
        ValueError: an input image is missing, or nothing reads it.
    """
    has, name, family = source.input_columns, recipe.prompts.name, type(policy).__name__
    if missing := [image for image in policy.reads_inputs if image not in has]:
        raise ValueError(
            f"policy.name is {recipe.policy.name!r}, whose {family} edits an input image, and the prompts of "
            f'prompts.name = {name!r} have no {missing[0]}: give prompts.name = "file" and its column as '
            f"prompts.{missing[0]}_column"
        )
    if has and not policy.reads_inputs:
        raise ValueError(
            f"prompts.image_column is {has['image']!r}, and {family} reads no input image: take an editing family, such "
            'as policy.name = "flux_kontext", or leave the key out'
        )


def check_prompt_files(recipe: Recipe, policy: PolicyConfig, source: PromptSource) -> None:
    """Check the files of the prompts, and that no prompt has more input images than the family reads.

    Raises:
        ValueError: a file cannot be used, or a prompt has too many images.
    """
    source.check()
    if not source.input_columns or not isinstance(source, PromptList):
        return
    prompts: Sequence[Prompt] = [*source.sampled(), *source.evaluated()]
    refuse_more_inputs(prompts, policy.most_inputs, f"policy.name = {recipe.policy.name!r}")

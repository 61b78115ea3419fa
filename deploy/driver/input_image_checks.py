"""Refuse recipes whose prompts and model family do not agree on input images."""

from collections.abc import Sequence

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.input_images import IMAGE, files_of
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
    """Check the files of the prompts, and that the family can read as many input images as they have.

    Raises:
        ValueError: a file cannot be used, a prompt has too many images, or numbers differ for a sharded network.
    """
    source.check()
    if not source.input_columns or not isinstance(source, PromptList):
        return
    prompts: Sequence[Prompt] = [*source.sampled(), *source.evaluated()]
    refuse_more_inputs(prompts, policy.most_inputs, f"policy.name = {recipe.policy.name!r}")
    counts = {len(files_of(prompt.metadata, IMAGE)) for prompt in source.sampled()}
    if recipe.learner.shard_weights and len(counts) > 1:
        # The network runs once for each number, and ranks gather its weights in every run: they would wait for ever.
        raise ValueError(
            f"learner.shard_weights is true, and prompts have {' or '.join(map(str, sorted(counts)))} input images: give "
            "all prompts one number of images, or leave shard_weights out"
        )

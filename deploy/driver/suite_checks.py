"""Check a recipe that follows a suite: rewards that stand for its scorers, and prompts that are trained on."""

from collections.abc import Mapping

from ray_ddpo.actors.rewards.frames import FrameScoring
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.prompts import PromptSource
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.suite_prompts import followed_prompts, trained_on


def check_suite(
    recipe: Recipe, policy: PolicyConfig, rewards: Mapping[str, Reward], of_suite: Mapping[str, Reward]
) -> None:
    """Check that a reward with the name of one of the suite's scorers gives the same scores.

    Args:
        recipe: the recipe.
        policy: the model family.
        rewards: the rewards that are trained on, by name.
        of_suite: the suite's scorers by name.

    Raises:
        ValueError: a reward has other settings than the suite's scorer, or the family edits images.
    """
    suite, tables = recipe.evaluation.suite, {table.called: table for table in recipe.all_rewards}
    if of_suite and policy.reads_inputs:
        raise ValueError(
            f"evaluation.suite is {suite!r}, whose prompts have no input image, and {type(policy).__name__} edits one: "
            'give suite = "none"'
        )
    scored = {table.called: FrameScoring.of(table) for table in recipe.suite_scorers}
    for name in of_suite.keys() & rewards.keys():
        ours, theirs = ({"class": type(each).__name__, **each.model_dump()} for each in (rewards[name], of_suite[name]))
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if differing or FrameScoring.of(tables[name]) != scored[name]:
            said = ", ".join(f"{key} {ours.get(key)!r} and not {theirs.get(key)!r}" for key in differing) or "frames"
            raise ValueError(
                f"the reward {name!r} has the name of a scorer of the suite {suite!r} and other settings ({said}): give "
                f'the reward a label of its own, such as label = "trained_{name}"'
            )


def suite_notes(recipe: Recipe, source: PromptSource) -> list[str]:
    """Return a line if the suite's prompts are trained on, and one if it takes the place of held-out prompts."""
    if recipe.evaluation.followed is None:
        return []
    suite, texts = recipe.evaluation.suite, [prompt.text for prompt in followed_prompts(recipe.evaluation)]
    held_out, both, notes = source.held_out(), trained_on(texts, source.listed() or ()), []
    if both:
        notes.append(
            f"{len(both)} of the {len(texts)} prompts of the suite {suite} are trained on too, such as {both[0]!r}: its "
            "scores do not show how the model does on prompts that it has not seen"
        )
    if held_out and set(held_out) != set(texts):
        notes.append(f"evaluations follow the suite {suite}: the prompts that [prompts] holds out are not sampled")
    return notes

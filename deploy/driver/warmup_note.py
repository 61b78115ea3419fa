"""Report a learning-rate warmup that is longer than the run."""

from ray_ddpo.deploy.driver.components import Components


def warmup_note(components: Components) -> str | None:
    """Return the warning with advice; None if the learning rate reaches its full value before the run's last step."""
    recipe = components.recipe
    warmup, a_round = recipe.learner.warmup_steps, components.algorithm.steps_per_round(recipe)
    steps = a_round * recipe.rounds
    if warmup <= steps:
        return None
    return (
        f"learner.warmup_steps is {warmup:,}, and the run has {steps:,} optimizer steps ({recipe.rounds:,} rounds of "
        f"{a_round:,}): its last step has {steps / warmup:.1%} of learner.learning_rate; give fewer warmup_steps, or "
        "more rounds"
    )

"""Queries of a run."""

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training


def final_fingerprint(recipe: Recipe, **how: bool) -> str:
    """Run a recipe to its end; the fingerprint of the weights in its last checkpoint."""
    run_training(recipe, **how)
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None and newest.name == f"round-{recipe.rounds:06d}"
    return load_checkpoint(newest).learner.trained.fingerprint

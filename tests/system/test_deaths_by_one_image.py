"""An image that kills its reward worker or sampler is found, dropped and named; the others keep their bits."""

import json
import shutil
from pathlib import Path

import pytest

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.learner import Learner
from tests.deadly_decoder import FILE
from tests.failure_page import assert_documented
from tests.faulty_rewards import KILLER, UNDECODABLE
from tests.system.conftest import final_fingerprint

FAULTS = "tests.faulty_rewards"


def mean_of_latents(recipe: Recipe, number: int) -> float:
    """Of the image in the first round whose prompt has this number."""
    components = build_components(recipe)
    weights = Learner(components.policy, components.algorithm, recipe).weights()[-1]
    sampler = Sampler(components.policy, recipe.sampling, recipe.runtime)
    for task in round_tasks(recipe, 0, components.prompts.load()):
        for row, prompt in enumerate(task.prompts):
            if prompt.metadata["number"] == number:
                _, trajectory, _ = sampler.sample(task, weights)
                assert trajectory is not None
                return float(trajectory.final_latents[row].mean())
    raise AssertionError(f"no prompt has the number {number}")


@pytest.mark.system
def test_images_that_kill_workers_are_dropped_and_change_no_other_image(
    tables: dict, tmp_path: Path, cluster: None, capfd: pytest.CaptureFixture
) -> None:
    tables |= {"prompts": {"name": "function", "path": f"{FAULTS}:numbered_prompt"}}
    tables["sampling"] |= {"batch_size": 16, "batches_per_round": 1}
    calm = {**tables, "name": "calm", "reward": {"name": "function", "path": f"{FAULTS}:not_finite_for_the_same"}}
    recipe = Recipe.parse(calm)
    expected = final_fingerprint(recipe, serial=True)

    model = tmp_path / "deadly"
    shutil.copytree(tables["policy"]["model"], model)
    (model / FILE).write_text(repr(mean_of_latents(recipe, UNDECODABLE)))
    deadly = {**tables, "name": "deadly", "policy": {"name": "tests.deadly_decoder:Deadly", "model": str(model)}}
    deadly["reward"] = {"name": "function", "path": f"{FAULTS}:dies_of_one"}
    recipe = Recipe.parse(deadly)
    capfd.readouterr()
    assert final_fingerprint(recipe) == expected

    lines = (Path(recipe.run_path()) / "metrics.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    assert [metrics["images_dropped"] for metrics in rounds] == [2, 0]
    assert sum(metrics.get("actor_restarts/sampler", 0) for metrics in rounds) == 4
    assert sum(metrics.get("actor_restarts/reward_worker", 0) for metrics in rounds) == 4
    said = capfd.readouterr().err.splitlines()
    (killer,) = [line for line in said if f"prompt 'cat number {KILLER}'" in line]
    situation = (
        "an image kills the reward worker that scores it (`os.abort()`, a segmentation fault, an assertion on the GPU)"
    )
    assert_documented(situation, 0, killer)
    (undecodable,) = [line for line in said if f"prompt 'cat number {UNDECODABLE}'" in line]
    assert_documented("an image kills the sampler that decodes it", 0, undecodable)

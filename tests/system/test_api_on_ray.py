"""Functions and classes of a script travel to Ray's processes by value, and train the same bits as named ones in one process."""

from pathlib import Path
from typing import Any

import pytest

from ray_ddpo import ClippedPolicyGradient, Prompt, PromptSource, Recipe, Tracker, train
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from tests.test_api import fingerprint, one_round
from tests.whole_components import LiveRounds

pytestmark = pytest.mark.system
OWN = "tests.whole_components"


def components_of_a_script(model: Path) -> dict[str, Any]:
    """Components whose classes no other process can import, because they are defined inside of a function."""

    class MyFamily(StableDiffusion):
        pass

    class MyCats(PromptSource):
        def listed(self) -> list[str]:
            return [f"cat number {number}" for number in range(3)]

        def load(self) -> Any:
            return lambda generator: Prompt(f"cat number {generator.integers(3)}")

    class MyRLOO(ClippedPolicyGradient):
        def worth(self, statistics: Any, prompts: list[str], rewards: Any, images_per_prompt: int) -> Any:
            groups = rewards.reshape(-1, images_per_prompt)
            others = (groups.sum(1, keepdims=True) - groups) / max(images_per_prompt - 1, 1)
            return statistics, (groups - others).ravel()

    class MyRounds(Tracker):
        def check(self) -> None:
            pass

        def start(self, run: Any) -> LiveRounds:
            return LiveRounds(Path(run.folder) / "rounds.txt")

    level = 255
    return {
        "policy": MyFamily(model=str(model)),
        "prompts": MyCats(),
        "reward": lambda images, prompts, metadata: images[..., 0].mean(axis=(1, 2)) / level,
        "algorithm": MyRLOO(clip_range=1e-3),
        "trackers": [MyRounds()],
    }


def named(tables: dict, model: Path, name: str) -> Recipe:
    return one_round(
        tables,
        name=name,
        policy={"name": f"{OWN}:Family", "model": str(model)},
        prompts={"name": f"{OWN}:Cats", "images_per_prompt": 2},
        reward={"name": f"{OWN}:Redness"},
        algorithm={"name": f"{OWN}:RLOO", "clip_range": 1e-3},
        trackers=[{"name": f"{OWN}:Rounds"}],
    )


def test_own_components_named_or_handed_over_train_the_same_on_ray(
    tables: dict, tiny_model: Path, cluster: None
) -> None:
    serial = train(named(tables, tiny_model, "serial"), serial=True)
    by_name = train(named(tables, tiny_model, "by_name"))
    by_value = train(one_round(tables, name="by_value"), **components_of_a_script(tiny_model))
    assert fingerprint(by_name) == fingerprint(by_value) == fingerprint(serial)
    for run in (by_name, by_value):
        assert (Path(run.folder) / "rounds.txt").read_text() == "0\n"
        assert len(run.images(0)) == 8

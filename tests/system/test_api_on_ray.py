"""A script's own function travels to Ray's processes by value, and trains the same bits as a named one in one process."""

from pathlib import Path
from typing import Any

import pytest

from ray_ddpo import Prompt, PromptSource, Recipe, Tracker, train
from tests.test_api import fingerprint, one_round
from tests.whole_components import RLOO, Family, LiveRounds

pytestmark = pytest.mark.system
OWN = "tests.whole_components"


def components_of_a_script(model: Path) -> dict[str, Any]:
    """Return components of which the reward, the prompts and the tracker are of code that no other process can import."""

    class MyCats(PromptSource):
        def listed(self) -> list[str]:
            return [f"cat number {number}" for number in range(3)]

        def load(self) -> Any:
            return lambda generator: Prompt(f"cat number {generator.integers(3)}")

    class MyRounds(Tracker):
        def start(self, run: Any) -> LiveRounds:
            return LiveRounds(Path(run.folder) / "rounds.txt")

    level = 255
    return {
        "policy": Family(model=str(model)),
        "prompts": MyCats(),
        "reward": lambda images, prompts, metadata: images[..., 0].mean(axis=(1, 2)) / level,
        "algorithm": RLOO(clip_range=1e-3),
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

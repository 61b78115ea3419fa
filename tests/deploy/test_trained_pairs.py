"""ddpo preferences of a run: its pairs are those that the run was trained on, whatever its rewards were made to."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_ddpo import cli
from ray_ddpo.common.preference_files import read_preferences
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.train import run_training
from tests.conftest import small_tables

GROUP = 4
FIRST = {"name": "jpeg_compressibility"}
SECOND = {"name": "colourfulness", "weight": 0.5}
FLOOR = [FIRST, {"name": "brightness", "weight": 0.0, "floor": 0.215}]
DGPO = {"algorithm": {"name": "dgpo"}, "aggregation": {"kind": "advantages"}}
RUNS: dict[str, dict[str, Any]] = {
    "sum": {"rewards": [FIRST, SECOND]},
    "floor": {"rewards": FLOOR},
    "z_score": {"rewards": [FIRST, SECOND], "aggregation": {"kind": "z_score"}},
    "win_rate": {"rewards": [FIRST, SECOND], "aggregation": {"kind": "win_rate"}},
    "kl_reward": {"rewards": [FIRST], "sampling__kl_reward": 1e3},
    "floor of parts": {"rewards": FLOOR, "aggregation": {"kind": "z_score"}, "learner__parts_per_round": 2},
    "advantages": {"rewards": [FIRST, SECOND], **DGPO},
    "dropped": {"rewards": [FIRST, {"name": "function", "path": "tests.faulty_rewards:not_finite_for_bad"}]},
}
IN_TURNS = (pytest.mark.thorough, pytest.mark.rotated(every=2))
QUICK = ("floor", "kl_reward")  # a run takes two seconds, and both are tested before each merge
LIKE_THE_SUM = ("sum", "dropped")  # in all others the weighted sum chooses other pairs


def trained(tiny_model: Path, folder: Path, changes: dict[str, Any]) -> tuple[Recipe, str]:
    """Train two rounds of 16 images, and return the recipe and the run."""
    tables = small_tables(tiny_model, folder) | {"rollouts": {"images_every": 1}}
    del tables["reward"]
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(["cat", "dog", "bad"]))
    tables["prompts"] = {"name": "file", "path": str(prompts), "images_per_prompt": GROUP}
    tables["sampling"] = {**tables["sampling"], "batches_per_round": 4}
    tables["algorithm"], tables["learner"] = {"name": "dpo", "beta": 20.0}, {**tables["learner"], "micro_batch_size": 4}
    for key, value in changes.items():
        table, _, name = key.partition("__")
        tables[table] = {**tables[table], name: value} if name else value
    recipe = Recipe.parse(tables)
    run_training(recipe, serial=True)
    return recipe, recipe.run_path()


def ledger_tables(run: str) -> list[pa.Table]:
    folder = RunFolder(run)
    ledger = Ledger(folder.storage, folder.load_recipe([]).rollouts)
    return [ledger.read(round_index) for round_index in ledger.rounds()]


def pairs_of(values: np.ndarray, pixels: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the first best and the first worst image of each group that is complete and not all alike."""
    found = []
    for start in range(0, len(values), GROUP):
        group = values[start : start + GROUP]
        if np.isfinite(group).all() and group.max() > group.min():
            found.append((pixels[start + group.argmax()], pixels[start + group.argmin()]))
    return found


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else IN_TURNS) for name in RUNS])
def test_the_pairs_of_a_file_are_those_that_the_run_was_trained_on(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """The ledger's advantages are +1 and −1 for a pair with `dpo`, and the aggregated advantages with `dgpo`."""
    recipe, run = trained(tiny_model, tmp_path, RUNS[name])
    assert cli.main(["preferences", run, "--output", str(tmp_path / "pairs.parquet")]) == 0
    written = list(read_preferences(tmp_path / "pairs.parquet"))
    wanted, of_sums, dropped = [], [], 0
    for table in ledger_tables(run):
        advantages, pixels = table["advantage"].to_numpy(), table["pixels"].to_pylist()
        if recipe.algorithm.name == "dpo":
            assert set(advantages[np.isfinite(advantages)]) == {-1, 0, 1}
        dropped += int(np.isnan(advantages).sum())
        wanted += pairs_of(advantages, pixels)
        of_sums += pairs_of(table["reward"].to_numpy(), pixels)
    assert [(pair.chosen, pair.rejected) for pair in written] == wanted and len(wanted) > 3
    differ = len(set(of_sums) - set(wanted))
    print(f"{name}: {len(wanted)} pairs, of which {differ} are others by the weighted sum")
    assert (dropped > 0) is (name == "dropped") and (differ == 0) is (name in LIKE_THE_SUM)
    for pair in written:
        assert pair.chosen_reward is not None and pair.rejected_reward is not None
        assert pair.chosen_reward > pair.rejected_reward

"""Training on a preference file on Ray: the bits of one process, with three samplers and the kill of one."""

import os
import signal
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from tests.preference_pairs import offline_tables, write_pairs
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import at_round, beside, processes_of
from tests.tiny_families import MAKERS, policy_table


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("stable_diffusion", marks=pytest.mark.system),
        pytest.param("sd3", marks=pytest.mark.thorough),
    ],
)
def test_offline_dpo_on_ray_with_a_kill_has_the_bits_of_one_process(
    family: str, tables: dict, tmp_path: Path, cluster: None
) -> None:
    offline = offline_tables(tables, write_pairs(tmp_path / "pairs.parquet"))
    offline["policy"] = policy_table(family, MAKERS[family](tmp_path / "model"))
    offline |= {"rounds": 4, "max_policy_lag": 1}
    on_ray = Recipe.parse({**offline, "name": "ray", "samplers": {"count": 3}})
    with beside(at_round(Path(on_ray.run_path()), 2, _kill_a_sampler)):
        killed = final_fingerprint(on_ray)
    assert killed == final_fingerprint(Recipe.parse({**offline, "name": "alone"}), serial=True)


def _kill_a_sampler() -> None:
    os.kill(processes_of("ray::Sampler")[0].pid, signal.SIGKILL)

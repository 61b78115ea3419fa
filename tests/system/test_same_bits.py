"""The weights do not depend on who draws, scores and learns: the fingerprint table."""

import pytest

from common.config import Recipe
from tests.system.conftest import final_fingerprint

pytestmark = pytest.mark.system


@pytest.mark.parametrize("lag", [0, 1])
def test_any_number_of_samplers_and_reward_workers_arrives_at_the_same_bits(
    tables: dict, cluster: None, lag: int, capsys: pytest.CaptureFixture
) -> None:
    tables |= {"rounds": 4, "max_policy_lag": lag}
    tables["sampling"] |= {"batches_per_round": 4}
    found = {"serial": final_fingerprint(Recipe.parse({**tables, "name": "serial"}), serial=True)}
    for samplers in (1, 2, 3):
        roles = {"samplers": {"count": samplers}, "reward_workers": {"count": 1 + samplers % 2}}
        found[f"{samplers} samplers"] = final_fingerprint(Recipe.parse({**tables, "name": f"ray{samplers}", **roles}))
    with capsys.disabled():
        for how, fingerprint in found.items():
            print(f"\n  lag {lag}, {how:<11} {fingerprint[:16]}", end="")
    assert len(set(found.values())) == 1

"""A process that Ray's memory monitor ends is replaced like any other that dies, and changes no bit."""

from pathlib import Path

import psutil
import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from tests.failure_page import assert_documented
from tests.system.conftest import final_fingerprint
from tests.system.drivers import Driver, committed_fingerprint

FREE_BYTES = 4 << 30  # that the run may take before Ray's monitor ends its processes


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_a_process_that_is_ended_for_its_memory_is_replaced(
    tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + FREE_BYTES) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{threshold:.4f}")
    marker = tmp_path / "filled"
    tables |= {
        "prompts": {"name": "texts", "texts": ["cat", str(marker)]},
        "reward": {"name": "function", "path": "tests.faulty_rewards:fills_memory_once"},
    }
    driver = Driver(Recipe.parse({**tables, "name": "filled"}), tmp_path)
    code = driver.ended()
    assert_documented(
        "Ray's memory monitor ends a process, because its machine runs low on memory", code, driver.said()
    )
    filled = committed_fingerprint(Recipe.parse({**tables, "name": "filled"}))
    assert final_fingerprint(Recipe.parse({**tables, "name": "calm"}), serial=True) == filled

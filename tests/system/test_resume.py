"""A run that was stopped and resumed arrives at the bits of one that was not."""

import json
from pathlib import Path

import pytest

from common.config import Recipe
from tests.system.conftest import final_fingerprint
from train import train


def run_in_two_parts(tables: dict, first: int, **how: bool) -> str:
    """The run stops after `first` rounds, as at a Ctrl-C between rounds, and goes on with --resume auto."""
    checkpoint = {"every": 1, "keep": 2}
    train(Recipe.parse({**tables, "name": "parts", "rounds": first, "checkpoint": checkpoint}), **how)
    return final_fingerprint(Recipe.parse({**tables, "name": "parts", "checkpoint": checkpoint}), resume=True, **how)


@pytest.mark.parametrize("lag", [0, 1])
def test_stop_and_resume_changes_no_bit(tables: dict, lag: int) -> None:
    tables |= {"rounds": 4, "max_policy_lag": lag}
    whole = final_fingerprint(Recipe.parse({**tables, "name": "whole"}), serial=True)
    assert run_in_two_parts(tables, 2, serial=True) == whole


@pytest.mark.system
def test_stop_and_resume_changes_no_bit_on_ray(tables: dict, cluster: None) -> None:
    tables |= {"rounds": 3}
    whole = final_fingerprint(Recipe.parse({**tables, "name": "whole"}))
    assert run_in_two_parts(tables, 1) == whole


def test_metrics_after_a_resume_have_every_round_once(tables: dict) -> None:
    run_in_two_parts({**tables, "rounds": 3}, 2, serial=True)
    lines = (Path(tables["output_dir"]) / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]


def test_resume_auto_without_a_run_begins_one(tables: dict) -> None:
    fresh = final_fingerprint(Recipe.parse({**tables, "name": "fresh"}), serial=True)
    assert final_fingerprint(Recipe.parse({**tables, "name": "auto"}), serial=True, resume=True) == fresh

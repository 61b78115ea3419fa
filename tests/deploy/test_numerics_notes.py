"""Notes, printed once, on machines of different kinds and on rounding between samplers and learner."""

from dataclasses import replace

import numpy as np
import pytest

from ray_ddpo.common.machine import Machine, this_machine
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RolloutsTable
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import Task
from ray_ddpo.common.trajectory import Rollout, Scores, TaskReport
from ray_ddpo.deploy.driver.numerics_notes import NumericsNotes
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training
from tests.failure_page import assert_documented
from tests.rounds import components_with

ONE = Machine(processor="AMD EPYC (25/17), AVX512", versions="torch 2.13.0")
OTHER = replace(ONE, processor="Intel Xeon (6/143), AVX2")


def rollout(sampled_on: Machine, scored_on: Machine) -> Rollout:
    report = TaskReport(Task(0, 0, 0, (Prompt("cat"),), (1,)), "f", 1, 0, 0.0, machine=sampled_on)
    return Rollout(report, Scores({"beauty": np.zeros(1)}, 0.0, machines=frozenset({scored_on})), None, None)


def test_machines_of_one_kind_are_no_word(capsys: pytest.CaptureFixture) -> None:
    notes = NumericsNotes(ONE, ONE)
    notes.saw([rollout(ONE, OTHER), rollout(ONE, OTHER)])  # reward workers may all be of another kind
    notes.rounded({"log_prob_check/rounding": 5e-3})
    assert capsys.readouterr().err == ""


def test_a_resumed_run_says_that_its_machine_is_another_one(
    tables: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_training(components_with(tables, rounds=1).recipe, serial=True)
    folder = RunFolder(components_with(tables).recipe.run_path())
    newest = newest_checkpoint(folder.checkpoints)
    assert newest and load_checkpoint(newest).learner.machine == this_machine("cpu")
    assert Ledger(folder.storage, RolloutsTable()).read(0)["sampled_on"].to_pylist() == [str(this_machine("cpu"))] * 8
    this_machine.cache_clear()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    try:
        run_training(components_with(tables).recipe, resume=True, serial=True)
    finally:
        this_machine.cache_clear()
    assert_documented("A run resumes on another kind of machine", 0, capsys.readouterr().err)


def test_each_difference_is_said_once_and_in_one_line(capsys: pytest.CaptureFixture) -> None:
    notes = NumericsNotes(ONE)
    for _ in range(2):
        notes.saw([rollout(OTHER, ONE), rollout(ONE, OTHER)])
        notes.rounded({"log_prob_check/rounding": 2e-2})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all("AMD EPYC" in line and "Intel Xeon" in line for line in lines[:3])
    assert_documented("Samplers and learner are machines of different kinds", 0, lines[0])
    assert "samplers are machines of several kinds" in lines[1]
    assert "reward workers are machines of several kinds" in lines[2]
    assert "up to 0.02 apart" in lines[3]


def test_a_resume_on_another_kind_of_machine_is_pointed_out(capsys: pytest.CaptureFixture) -> None:
    NumericsNotes(ONE, OTHER)
    (line,) = capsys.readouterr().err.splitlines()
    assert "the checkpoint was made on another machine" in line and "AVX2" in line and "AVX512" in line

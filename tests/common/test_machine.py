"""Machines: which ones give the same bits, and how differences are named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ray_ddpo.common import machine
from ray_ddpo.common.machine import Machine, this_machine

ONE = Machine(processor="AMD EPYC (25/17), AVX512", versions="torch 2.13.0")
INTEL = replace(ONE, processor="Intel Xeon (6/143), AVX512")
GPU = replace(ONE, gpu="NVIDIA H100")


def test_this_machine_names_its_processor_and_the_libraries_that_decide_bits() -> None:
    here = this_machine("cpu")
    assert torch.backends.cpu.get_cpu_capability() in here.processor and here.gpu == ""
    assert f"torch {torch.__version__}" in here.versions and "diffusers" in here.versions
    assert str(here) == f"{here.processor}, {here.versions}"


def test_a_processor_decides_where_there_is_no_gpu_and_the_gpu_where_there_is_one() -> None:
    assert ONE.computes_like(replace(ONE)) and not ONE.computes_like(INTEL)
    assert GPU.computes_like(replace(INTEL, gpu="NVIDIA H100")) and not GPU.computes_like(ONE)
    assert not GPU.computes_like(replace(GPU, gpu="NVIDIA A100"))
    assert not ONE.computes_like(replace(ONE, versions="torch 2.14.0"))


def test_what_differs_is_named_with_both_values() -> None:
    assert ONE.differences(replace(ONE)) == ""
    assert ONE.differences(replace(GPU, versions="torch 2.14.0")) == (
        "GPU none and NVIDIA H100; versions torch 2.13.0 and torch 2.14.0"
    )


def test_variables_that_choose_kernels_are_part_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine._processor().endswith("ONEDNN_MAX_CPU_ISA=AVX2")


def test_processors_with_one_model_name_differ_by_their_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert machine._model_name() == "AMD EPYC (25/17)"
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "nothing")
    assert machine._model_name()

"""Describe the machine that a process computes on: processor, GPU and library versions, which decide the last bits."""

import functools
import os
import platform
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ray_ddpo.common.matrix_rate import matrix_rate
from ray_ddpo.common.package_versions import VERSIONED, package_version

CPU_INFO = Path("/proc/cpuinfo")
# Environment variables that select other kernels than the processor's default.
KERNEL_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware and libraries of a process. Equal machines give equal bits for equal work."""

    processor: str
    gpu: str = ""  # empty if the process computes on the CPU
    versions: str = ""  # of libraries: "torch 2.13.0, numpy 2.4.1"
    # Operations a second of matrix products in the policy's dtype, as measured once; 0: not measured.
    matrix_rate: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return ", ".join(part for part in (self.gpu, self.processor, self.versions) if part)

    def computes_like(self, other: "Machine") -> bool:
        """Return whether a network gives the same bits on both. If there is a GPU, the processor does not matter."""
        device = self.gpu == other.gpu and (bool(self.gpu) or self.processor == other.processor)
        return device and self.versions == other.versions

    def differences(self, other: "Machine") -> str:
        """Describe the differences, "processor A and B; …"; empty if there are none."""
        pairs = {
            "GPU": (self.gpu or "none", other.gpu or "none"),
            "processor": (self.processor, other.processor),
            "versions": (self.versions, other.versions),
        }
        return "; ".join(f"{name} {one} and {two}" for name, (one, two) in pairs.items() if one != two)


@functools.cache
def this_machine(device: str) -> Machine:
    """Return the machine of this process, which computes on `device`."""
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    versions = ", ".join(f"{package} {package_version(package)}" for package in VERSIONED)
    return Machine(processor=_processor(), gpu=gpu, versions=versions)


def measured_machine(device: str, dtype: torch.dtype) -> Machine:
    """Return the machine of this process with the measured rate of its matrix products in `dtype`."""
    return replace(this_machine(device), matrix_rate=matrix_rate(device, dtype))


def _processor() -> str:
    """Name the processor, the instructions that torch uses, and the variables that choose its kernels."""
    chosen = [f"{name}={os.environ[name]}" for name in KERNEL_VARIABLES if name in os.environ]
    return ", ".join([_model_name(), torch.backends.cpu.get_cpu_capability(), *chosen])


def _model_name() -> str:
    """Return the processor's model, family and number. Clouds often give several processors one model name."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in found:  # ARM
        return platform.machine()
    numbers = [found[key] for key in ("cpu family", "model") if key in found]
    return f"{found['model name'].strip()} ({'/'.join(numbers)})"

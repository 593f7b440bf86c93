"""Describe this machine, for reports and as the key of cached measurements."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """One torch device of this machine and its software.

    name         of the CPU or GPU
    cores        CPU cores this process may use
    threads      CPU threads torch uses within one operation
    instructions CPU instruction set that torch uses
    """

    name: str
    device: str
    cores: int
    threads: int
    instructions: str
    system: str
    python: str
    torch_version: str

    def __str__(self) -> str:
        return (
            f"{self.hardware}; {self.cores} cores; torch {self.torch_version}, Python {self.python}"
        )

    @property
    def hardware(self) -> str:
        """The hardware that speed depends on, without the number of cores, which may change."""
        if self.device != "cpu":
            return self.name
        return f"{self.name}, {self.instructions}, {self.threads} torch threads"

    def key(self, dtype: torch.dtype, head_dim: int) -> str:
        """Return the key of a cached measurement for this dtype and head dim."""
        number = str(dtype).removeprefix("torch.")
        return f"{self.hardware}; torch {self.torch_version}; {number}, head dim {head_dim}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(device: str | torch.device = "cpu") -> Machine:
    """Describe the machine as seen from one torch device."""
    kind, limited = torch.device(device).type, hasattr(os, "sched_getaffinity")
    name = torch.cuda.get_device_name(device) if kind == "cuda" else cpu_name()
    return Machine(
        name=name if kind in ("cpu", "cuda") else f"{kind} of {platform.machine()} {name}",
        device=kind,
        cores=len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch_version=str(torch.__version__),
    )


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def free_memory(device: str | torch.device) -> int:
    """Return the bytes that may still be allocated on `device`, as far as the system tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):  # not Linux
        return 8 * 10**9
    try:  # a container may be allowed less than the machine has
        limit, used = (
            int((Path("/sys/fs/cgroup") / name).read_text())
            for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # no limit, or "max"
        return found
    return max(min(found, limit - used), 0)

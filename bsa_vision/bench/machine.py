"""What the numbers were measured on, and how much memory there is to measure with."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """One machine and its software, as far as they bear on a measurement.

    cores    those this process may use; threads those torch uses within one operation
    devices  torch device -> its name
    """

    cpu: str
    cores: int
    threads: int
    memory_gb: float
    devices: dict[str, str]
    system: str
    python: str
    versions: dict[str, str]

    def __str__(self) -> str:
        gpus = "".join(f", {name}" for device, name in self.devices.items() if device != "cpu")
        torch_version, python = self.versions["torch"], self.python
        return f"{self.cpu}, {self.cores} cores, {self.threads} torch threads{gpus}; torch {torch_version}, Python {python}"


def describe_machine(devices: list[str]) -> Machine:
    """This machine, seen from the torch devices that are measured."""
    cpu = _cpu_model()
    names = {device: cpu if torch.device(device).type == "cpu" else _device_name(device) for device in devices}
    return Machine(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gb=round(_total_memory() / 1e9, 1),
        devices=names,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: found for name in ("torch", "bsa-vision", "transformers") if (found := _version(name))},
    )


def free_memory(device: str) -> int:
    """Bytes that may still be allocated on `device`, as far as the system tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _meminfo("MemAvailable")
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:  # a container may be allowed less than the machine has
        available = min(available, limit - used)
    return max(available, 0)


def _total_memory() -> int:
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    total = _meminfo("MemTotal")
    return total if limit is None else min(total, limit)


def _meminfo(field: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: physical memory is the best that is known without another package
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 10**9
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None

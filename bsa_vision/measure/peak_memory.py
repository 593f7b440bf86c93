"""Peak memory of a stretch of work in this process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


class Meter:
    """The peak of this process's memory since the meter was made, over what was in use then."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.baseline = torch.cuda.memory_allocated(device)
            return
        _give_back()
        try:
            Path("/proc/self/clear_refs").write_text(
                "5"
            )  # the kernel's high-water mark starts anew
            self.method, self.baseline = "VmHWM, reset", _status("VmRSS")
        except OSError:
            # Without that the mark of before counts as the baseline, and a peak below it cannot be seen.
            self.method, self.baseline = "ru_maxrss", _max_rss()

    def peak(self) -> int:
        """Bytes over the baseline."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.baseline
        return max(
            0, (_status("VmHWM") if self.method.startswith("VmHWM") else _max_rss()) - self.baseline
        )


def _give_back() -> None:
    """Freed memory back to the system: the C library keeps it otherwise, and what the work then takes of it would not show."""
    gc.collect()
    trim = (
        getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    )  # glibc's
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _max_rss() -> int:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

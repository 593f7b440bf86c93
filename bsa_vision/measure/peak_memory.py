"""Measure the peak memory of a part of this process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


class Meter:
    """Peak memory of this process since the meter was made, minus what was in use then."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.baseline = torch.cuda.memory_allocated(device)
            return
        _release_freed()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
            self.method, self.baseline = "VmHWM, reset", _status("VmRSS")
        except OSError:
            # The mark cannot be reset: it is the baseline, and lower peaks cannot be seen.
            self.method, self.baseline = "ru_maxrss", _max_rss()

    def peak(self) -> int:
        """Return the bytes over the baseline."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.baseline
        highest = _status("VmHWM") if self.method.startswith("VmHWM") else _max_rss()
        return max(0, highest - self.baseline)


def _release_freed() -> None:
    """Return freed memory to the system; reusing what the C library keeps would not be seen."""
    gc.collect()
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    trim = getattr(library, "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _max_rss() -> int:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

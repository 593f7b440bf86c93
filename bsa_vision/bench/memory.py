"""Peak memory of one call in a fresh process: `python -m bsa_vision.bench.memory` reads a job and prints what it found.

The baseline is taken when q, k, v exist and torch has run a tiny call of the same way. What a way builds for itself (a
spelled-out mask, block lists, buffers, the output) counts. FlexAttention is called once in full before the baseline:
compiling takes memory of its own, which is not attention's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bsa_vision.bench.case import Case, make_inputs, make_masks
from bsa_vision.bench.ways import WAYS, Setup, set_up
from masks import Pattern

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Bytes over the baseline at the peak, or None and why not.

    method  how it was read
    """

    peak: int | None
    method: str = ""
    reason: str = ""


def measure_memory(case: Case, way: str, backend: str = "auto") -> Memory:
    """One call of `way` in a process of its own, with as many torch threads as this one has."""
    job = {"case": case.to_json(), "way": way, "backend": backend, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "bsa_vision.bench.memory"]
    result = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if result.returncode < 0:
        return Memory(None, reason=f"the process was ended by signal {-result.returncode}; most likely memory ran out")
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return Memory(None, reason=lines[-1][:200] if lines else f"the process ended with {result.returncode}")
    return Memory(**json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    peak, method = _measure(Case.from_json(job["case"]), job["way"], job["backend"])
    print(json.dumps({"peak": peak, "method": method}))


def _measure(case: Case, way: str, backend: str) -> tuple[int, str]:
    tiny = replace(case, grid=(16, 16), pattern=Pattern("random_blocks", sparsity=0.5))
    WAYS[way].prepare(set_up(tiny, backend)).run()
    inputs = make_inputs(case)
    if way == "flex":
        setup = Setup(case, inputs, make_masks(case), backend)
        ready = WAYS[way].prepare(setup)
        ready.run()
        meter = Meter(case.device)
        ready.run()
        return meter.peak(), meter.method
    meter = Meter(case.device)
    WAYS[way].prepare(Setup(case, inputs, make_masks(case), backend)).run()
    return meter.peak(), meter.method


class Meter:
    """The peak of this process's memory since the meter was made, over what was in use then."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.baseline = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
            self.method, self.baseline = "VmHWM, reset", _status("VmRSS")
        except OSError:
            # Without that the mark of before counts as the baseline, and a peak below it cannot be seen.
            self.method, self.baseline = "ru_maxrss", _max_rss()

    def peak(self) -> int:
        """Bytes over the baseline."""
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.baseline
        return max(0, (_status("VmHWM") if self.method.startswith("VmHWM") else _max_rss()) - self.baseline)


def _status(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _max_rss() -> int:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()

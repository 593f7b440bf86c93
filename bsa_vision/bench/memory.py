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

import torch

from bsa_vision.bench.case import Case, make_inputs, make_masks
from bsa_vision.bench.ways import WAYS, Setup, set_up
from bsa_vision.masks import Pattern
from bsa_vision.measure.peak_memory import Meter


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


if __name__ == "__main__":
    main()

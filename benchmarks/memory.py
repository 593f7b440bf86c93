"""Measure the peak memory of one attention call in fresh processes, with each implementation.

    python benchmarks/memory.py --tokens 128x128 --density 0.25 --implementation bsa

Counted is what comes on top of q, k and v: the output, and what an implementation builds for itself
(a spelled-out mask, block lists, buffers). FlexAttention is called once in full beforehand, because
compiling takes memory of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from bsa_vision.bench.attention import selected
from bsa_vision.bench.case import Case, make_inputs
from bsa_vision.bench.implementations import IMPLEMENTATIONS
from bsa_vision.cli import parse
from bsa_vision.errors import BackendUnavailable
from bsa_vision.masks import Pattern
from bsa_vision.measure.peak_memory import Meter


def measure(case: Case, name: str) -> int | str:
    """Return the bytes at the peak of one call in a process of its own, or why there are none."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak, case, name).result()
        except BrokenProcessPool:
            return "the process was ended, most likely because memory ran out"
        except BackendUnavailable as error:
            return str(error)


def _peak(case: Case, name: str) -> int:
    implementation = IMPLEMENTATIONS[name]
    tiny = replace(case, grid=(16, 16), pattern=Pattern("random_blocks", sparsity=0.5))
    implementation.prepare(make_inputs(tiny)).run()  # what torch sets up once
    inputs = make_inputs(case)
    if name == "flex":
        prepared = implementation.prepare(inputs)
        prepared.run()
        meter = Meter(case.device)
        prepared.run()
        return meter.peak()
    meter = Meter(case.device)
    implementation.prepare(inputs).run()
    return meter.peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=parse.grid, default=(64, 64))
    parser.add_argument("--pattern", default="random", help="as in `bsa-vision bench`")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", type=parse.device, default="cpu")
    parser.add_argument("--implementation", action="append", choices=IMPLEMENTATIONS)
    asked = parser.parse_args()
    (pattern,) = parse.with_density(parse.pattern(asked.pattern), [asked.density], seed=0)
    order = parse.order_for(pattern, "auto")
    case = Case(asked.tokens, pattern, dtype=asked.dtype, device=asked.device, order=order)
    for name in selected(case, asked.implementation):
        peak = measure(case, name)
        text = peak if isinstance(peak, str) else f"{peak / 1e6:.1f} MB"
        print(f"{IMPLEMENTATIONS[name].title:20}{text}")


if __name__ == "__main__":
    main()

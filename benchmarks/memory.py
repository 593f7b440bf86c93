"""Measure the peak memory of one attention call in a fresh process per implementation.

    python benchmarks/memory.py --tokens 128x128 --density 0.25 --implementation bsa

The peak counts memory on top of q, k and v: the output, masks per token, block lists and buffers.
FlexAttention runs once beforehand, so that memory for compilation is not counted.
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
    """Return the peak bytes of one call in a new process, or why there are none."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak, case, name).result()
        except BrokenProcessPool:
            return "the process was killed, probably out of memory"
        except BackendUnavailable as error:
            return str(error)


def _peak(case: Case, name: str) -> int:
    implementation = IMPLEMENTATIONS[name]
    tiny = replace(case, grid=(16, 16), pattern=Pattern("random_blocks", sparsity=0.5))
    implementation.prepare(make_inputs(tiny)).run()  # torch's one-time initialisation
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
    add = parser.add_argument
    add("--tokens", type=parse.grid, default=(64, 64), help="ROWSxCOLUMNS. Default: 64x64.")
    add("--pattern", default="random", help="Pattern, as in `bsa-vision bench`. Default: random.")
    add("--density", type=float, default=0.25, help="Share of blocks to compute. Default: 0.25.")
    add("--dtype", default="float32", help="Data type. Default: float32.")
    add("--device", type=parse.device, default="cpu", help="Torch device. Default: cpu.")
    names = "Repeatable. Default: all that the device can run."
    add("--implementation", action="append", choices=IMPLEMENTATIONS, help=names)
    args = parser.parse_args()
    (pattern,) = parse.with_density(parse.pattern(args.pattern), [args.density], seed=0)
    order = parse.order_for(pattern, "auto")
    case = Case(args.tokens, pattern, dtype=args.dtype, device=args.device, order=order)
    for name in selected(case, args.implementation):
        peak = measure(case, name)
        text = peak if isinstance(peak, str) else f"{peak / 1e6:.1f} MB"
        print(f"{IMPLEMENTATIONS[name].title:20}{text}")


if __name__ == "__main__":
    main()

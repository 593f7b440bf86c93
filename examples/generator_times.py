"""Measure time and memory of the mask generators at 4,096 and 16,384 tokens, best of five calls.

python examples/generator_times.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

import masks
from bsa_vision.masks import layout

SIDES = {4096: 64, 16384: 128}
CALLS = {
    "generate_vit_spatial_locality_mask": lambda n: (SIDES[n] * 16, 16, 128, 1, 12),
    "generate_vit_random_sparse_mask": lambda n: (SIDES[n] * 16, 16, 128, 1, 12),
    "generate_vit_strided_mask": lambda n: (SIDES[n] * 16, 16, 128, 1, 12),
    "generate_vit_hybrid_mask": lambda n: (SIDES[n] * 16, 16, 128, 1, 12),
    "generate_vit_multiscale_mask": lambda n: (SIDES[n] * 16, 16, 128, 1, 12),
    "generate_sam_image_to_prompt_mask": lambda n: (n, 5, 128, 1, 12),
    "generate_sam_hierarchical_mask": lambda n: (n, 5, 128, 1, 12),
    "generate_sam_region_focused_mask": lambda n: (n, 5, [(10, 20), (40, 30)], 128, 1, 12),
    "generate_sam_hybrid_encoder_mask": lambda n: (n, 128, 1, 12),
    "generate_sam_cross_attention_mask": lambda n: (300, n, 128, 1, 12),
}


def clear_caches() -> None:
    """Clear the caches of layouts, so that every call computes everything."""
    for function in vars(layout).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def measure(name: str, tokens: int) -> tuple[float, float]:
    """Return the seconds of the fastest of five calls, and the MB they added to peak memory."""
    function, arguments = getattr(masks, name), CALLS[name](tokens)
    function(*CALLS[name](4096))  # warm-up of torch
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(5):
        clear_caches()
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    if len(sys.argv) == 3:  # one measurement in a separate process, for its peak memory
        print(*measure(sys.argv[1], int(sys.argv[2])))
        return
    table = Table("generator", *(f"{n} tokens: ms | MB" for n in SIDES))
    for name in CALLS:
        cells = []
        for tokens in SIDES:
            command = [sys.executable, __file__, name, str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, megabytes = map(float, done.stdout.split())
            cells.append(f"{seconds * 1e3:.1f} | {megabytes:.0f}")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()

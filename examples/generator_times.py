"""What the mask generators cost: best of five and extra memory, at 4096 and 16,384 tokens.

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


def forget() -> None:
    """Drop what layouts remember, so that every call is a first call."""
    for name in (
        "_permutation",
        "_inverse",
        "_coordinates",
        "_special_blocks",
        "_rectangles",
        "_block_distance",
    ):
        getattr(layout, name).cache_clear()
    layout._centroid_distance.cache_clear()


def measure(name: str, tokens: int) -> tuple[float, float]:
    """(best of five seconds, MB of peak memory that the calls added) in this process."""
    function, arguments = getattr(masks, name), CALLS[name](tokens)
    getattr(masks, name)(*CALLS[name](4096))  # torch's own first-call costs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(5):
        forget()
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    if len(sys.argv) == 3:  # one measurement in a process of its own
        print(*measure(sys.argv[1], int(sys.argv[2])))
        return
    table = Table("generator", *(f"{n} tokens, ms | MB" for n in SIDES))
    for name in CALLS:
        cells = []
        for tokens in SIDES:
            command = [sys.executable, __file__, name, str(tokens)]
            output = subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.split()
            cells.append(f"{float(output[0]) * 1e3:.1f} | {float(output[1]):.0f}")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()

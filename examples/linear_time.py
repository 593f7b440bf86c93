"""Time local masks of fixed radius at 4,096 to 65,536 tokens: is time linear in tokens?

python examples/linear_time.py [--rounds 7]
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

import bsa_vision as bsa
from bsa_vision import masks
from bsa_vision.measure.timing import paired

HEADS, RADIUS = 12, 8
GRIDS = ((64, 64), (64, 256), (64, 1024), (256, 256))


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; default: 7")
    arguments = parser.parse_args()
    pattern = masks.Pattern("local_window", radius=RADIUS)
    runs, pairs = {}, {}
    for grid in GRIDS:
        layout = masks.TokenLayout(grid, order="tile")
        hm = bsa.HeadMasks.from_patterns(layout, pattern, heads=HEADS)
        tensors = [torch.randn(1, HEADS, layout.num_tokens, 64) for _ in range(3)]
        runs[grid] = lambda tensors=tensors, hm=hm: bsa.sparse_attention(*tensors, hm)
        pairs[grid] = sum(hm.kept_pairs(layout.num_tokens, layout.num_tokens))
    with torch.no_grad():
        timings = paired(runs, arguments.rounds, warmup=2)
    first = GRIDS[0]
    table = Table("grid", "tokens", "kept blocks per row", "ms", "time / token", "time / kept pair")
    for grid in GRIDS:
        tokens, times = grid[0] * grid[1], timings[grid]
        per_token = times.ratio * first[0] * first[1] / tokens
        per_pair = times.ratio * pairs[first] / pairs[grid]
        kept = pairs[grid] / tokens / HEADS / 128
        cells = [f"{grid[0]} x {grid[1]}", f"{tokens:,}", f"{kept:.2f}"]
        cells += [f"{times.median * 1e3:.0f}", f"{per_token:.2f}", f"{per_pair:.2f}"]
        table.add_row(*cells)
    Console().print(table)
    Console().print(
        f"local_window(radius={RADIUS}), tile order; last two columns relative to the first row"
    )


if __name__ == "__main__":
    main()

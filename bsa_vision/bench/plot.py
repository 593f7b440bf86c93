"""Plot relative time over density, with the ideal line. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bsa_vision.bench.attention import OK, Row
from bsa_vision.bench.implementations import BASELINE, IMPLEMENTATIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def plot_rows(rows: Sequence[Row], title: str) -> Figure:
    """Plot time / dense time over density; ideal scaling is a straight line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(7.5, 5.7), layout="constrained")
    axes = figure.subplots()
    for name, implementation in IMPLEMENTATIONS.items():
        found = [(row.density, row.implementations.get(name)) for row in rows]
        points = sorted(
            (density, m.timing.ratio, *m.timing.spread)
            for density, m in found
            if name != BASELINE and m is not None and m.status == OK and m.timing is not None
        )
        if points:
            x, y, low, high = zip(*points, strict=True)
            bars = [[b - a for a, b in zip(low, y)], [b - a for a, b in zip(y, high)]]
            axes.errorbar(x, y, bars, label=implementation.title, marker="o", capsize=2)
    low_end = min([0.1, *(row.density for row in rows)])
    axes.plot([low_end, 1], [low_end, 1], color="black", lw=1, label="ideal: ratio = density")
    axes.axhline(1, color="black", lw=1, ls=":", label=IMPLEMENTATIONS[BASELINE].title)
    axes.set(xscale="log", yscale="log", xlabel="realised density (computed blocks / all blocks)")
    axes.set_ylabel("time / time of dense SDPA (median, minimum to maximum)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, alpha=0.25)
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=8)
    return figure

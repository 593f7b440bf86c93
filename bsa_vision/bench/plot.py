"""The picture of a run: time against density, with the line of ideal proportion. Needs matplotlib (the `plots` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsa_vision.bench.attention import OK, Row
from bsa_vision.bench.ways import BASELINE, WAYS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = {
    "ours": ("o", "#d9480f"),
    "sdpa-mask": ("s", "#1971c2"),
    "flex": ("^", "#2b8a3e"),
    "sdpa-bias": ("D", "#868e96"),
}
ACROSS = 3  # panels side by side
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def plot_rows(rows: Sequence[Row], title: str, labels: Sequence[str]) -> Figure:
    """Time over dense time against realised density, both logarithmic, so that proportion is a straight line.

    labels  one per row: rows of one label share a panel
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(labels))
    across = min(ACROSS, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(max(7.5, 4.5 * across), 1.5 + 4.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, _points([row for row, label in zip(rows, labels, strict=True) if label == name]))
        axes.set_title(name, fontsize=9)
        axes.label_outer()
    for axes in list(panels)[len(names) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=9)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _panel(axes: Axes, points: dict[str, list[Point]]) -> None:
    for way, values in points.items():
        marker, color = STYLE[way]
        _draw(axes, values, WAYS[way].title, marker, color)
    low = min([0.1, *(density for values in points.values() for density, *_ in values)])
    axes.plot([low, 1], [low, 1], color="black", linewidth=1, label="ideal: ratio = density")
    axes.axhline(1, color="black", linewidth=1, linestyle=(0, (1, 3)), label=WAYS[BASELINE].title)
    _label(axes)


Point = tuple[float, float, float, float]  # density, ratio, smallest and largest ratio


def _points(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """way -> points by rising density; ways that did not run, or not rightly, have none."""
    points: dict[str, list[Point]] = {}
    for row in rows:
        for way, m in row.measurements.items():
            if way != BASELINE and m.status == OK and m.timing is not None:
                points.setdefault(way, []).append((row.density, m.timing.ratio, *m.timing.spread))
    return {way: sorted(values) for way, values in points.items()}


def _draw(axes: Axes, values: list[Point], label: str, marker: str, color: str) -> None:
    density, ratio, low, high = zip(*values, strict=True)
    below = [max(r - lo, 0) for r, lo in zip(ratio, low, strict=True)]
    above = [max(hi - r, 0) for r, hi in zip(ratio, high, strict=True)]
    axes.errorbar(density, ratio, [below, above], label=label, marker=marker, color=color, capsize=2, markersize=6)


def _label(axes: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("realised density (computed blocks / all blocks)")
    axes.set_ylabel("time / time of dense SDPA (median, smallest to largest)")
    axes.grid(True, alpha=0.25)


def save_plot(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)

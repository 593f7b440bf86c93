"""Figures of the HTML report, drawn from the results of tuning (`report_data.describe`).

Needs matplotlib, but no display.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from bsa_vision.tuning.report_data import PERCENTILES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Layers = Sequence[Mapping[str, Any]]  # `layers` of the report

# Distinguishable with colour blindness.
BLUES, ORANGE, GREY = ("#a6cee3", "#5ba3cf", "#0072b2"), "#d55e00", "#666666"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names may contain $
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with fixed settings instead of the user's."""
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError(
            f"the report needs matplotlib, which cannot be imported ({error}): "
            "pip install 'bsa-vision[tune]'."
        ) from None
    with style.context(["default", STYLE]):
        yield


def inline(figure: Figure, name: str, caption: str, kind: str = "figure") -> str:
    """Return a figure as SVG whose ids start with `name`, so that figures do not share ids."""
    from matplotlib import rc_context

    out, empty = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=empty)
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(
        r"<[^>]*>", lambda tag: re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag[0]), svg
    )
    return f'<figure class="{kind}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def sparsity_map(layers: Layers) -> Figure:
    """Draw the share of skipped blocks and the pattern of every head."""
    from matplotlib.figure import Figure

    skipped = np.array([[1 - head["density"] for head in layer["heads"]] for layer in layers])
    (rows, columns), names = skipped.shape, [layer["layer"] for layer in layers]
    width = 0.66 * columns + 0.085 * max(map(len, names)) + 0.4
    figure = Figure((width, 0.45 * rows + 0.7), layout="constrained")
    axes = figure.subplots()
    axes.pcolormesh(skipped, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    for (row, column), value in np.ndenumerate(skipped):
        style: dict[str, Any] = dict(color="black" if value > 0.45 else "white", ha="center")
        pattern = _short(layers[row]["heads"][column]["pattern"])
        x = column + 0.5
        axes.text(x, row + 0.4, f"{value:.0%}", va="bottom", **style)
        axes.text(x, row + 0.46, pattern, va="top", fontsize=6, linespacing=1, **style)
    axes.set_xticks(np.arange(columns) + 0.5, list(map(str, range(columns))))
    axes.set_yticks(np.arange(rows) + 0.5, names)
    axes.set_xlabel("head")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _short(pattern: str) -> str:
    """Shorten the name of a pattern for a small cell.

    (local_window(radius=1) | strided(stride=4)) -> "local 1" and, on a second line, "+ strided 4".
    """
    parts = re.findall(r"(\w+)\(([^()]*)\)", pattern) or [(pattern, "")]
    lines = [
        " ".join([name.removesuffix("_window"), *re.findall(r"=([^,]*)", values)])
        for name, values in parts
    ]
    return "\n+ ".join(line if len(line) <= 10 else line[:9] + "…" for line in lines[:2])


def curve(tuned: Mapping[str, Any]) -> Figure:
    """Draw predicted and measured error against sparsity."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure((7, 4.2), layout="constrained")
    axes = figure.subplots()
    at, tried, limit = tuned["sparsity"], tuned["tried"], tuned["asked"].get("max_error")
    predicted, measured = tuned["predicted"], tuned["measured"]
    run, errors = [trial["sparsity"] for trial in tried], [trial["measured"] for trial in tried]
    axes.plot(*zip((0, 0), *tuned["curve"], strict=True), color=GREY, label="predicted")
    axes.plot(run, errors, "o", color=ORANGE, ms=4, label="trials, measured")
    axes.plot([at, at], [predicted, measured], color=ORANGE, linewidth=1)
    axes.plot(at, predicted, "x", color="black", ms=7, label="plan, predicted")
    axes.plot(at, measured, "o", color=ORANGE, mec="black", ms=10, label="plan, measured")
    if limit is not None:
        axes.axhline(limit, color="black", linewidth=1, linestyle=(0, (4, 3)), label="max_error")
    largest = max(predicted, limit or 0, *errors)
    # The predicted line goes on to errors far above those of interest.
    axes.set(xlim=(0, 1), ylim=(0, 2.5 * largest or 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.set_xlabel("blocks skipped")
    axes.set_ylabel("relative L2 error of the target")
    axes.legend(frameon=False, loc="upper left")
    return figure


def by_layer(layers: Layers) -> Figure:
    """Draw the measured error of each layer's output against the predicted one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    side = 4.6  # inches
    shown = [layer for layer in layers if min(layer["predicted"], layer["measured"]) > 0]
    figure = Figure((side + 1, side + 0.8), layout="constrained")
    axes = figure.subplots()
    points = np.array([[layer["predicted"], layer["measured"]] for layer in shown]).reshape(-1, 2)
    low, high = (points.min() / 1.4, points.max() * 1.4) if len(points) else (0.01, 1)
    axes.plot([low, high], [low, high], color=GREY, linewidth=1)
    axes.plot(*points.T, "o", color=BLUES[-1], ms=5)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 3)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("predicted relative L2 error")
    axes.set_ylabel("measured relative L2 error")
    labels = _labels(shown)
    places = np.log(points / low) / math.log(high / low) * side * 72  # pt
    style: dict[str, Any] = dict(textcoords="offset points", ha="center", va="center")
    style["arrowprops"] = dict(arrowstyle="-", color=GREY, linewidth=0.5, shrinkA=0, shrinkB=3)
    for point, offset, label in zip(points, _free_places(places, labels), labels, strict=True):
        axes.annotate(label, tuple(point), offset, **style)
    return figure


def _labels(layers: Layers) -> list[str]:
    """Return the keys of the layers, or only their numbers if all have the same role."""
    keys = [layer["key"] for layer in layers]
    one_role = len({key.rpartition(".")[0] for key in keys}) == 1
    return [key.rpartition(".")[2] for key in keys] if one_role else keys


def _free_places(points: np.ndarray, labels: Sequence[str]) -> list[tuple[float, float]]:
    """Return the offset of each label's middle from its point (P, 2), in pt.

    Labels cover neither each other nor points, if there is room.
    """
    taken = [(x, y, 3.0) for x, y in points]  # middle, half the width
    offsets = []
    for (x, y), label in zip(points, labels, strict=True):
        half = 2.5 * len(label) + 1
        away = 3 * math.pi / 4 if y > x else -math.pi / 4  # from the diagonal
        turns = [away + sign * step * math.pi / 6 for step in range(7) for sign in (1, -1)]
        around = [
            (math.cos(turn) * (far + half), math.sin(turn) * far)
            for far in (8, 14, 21, 29, 38)
            for turn in turns
        ]

        free = [
            (right, up)
            for right, up in around
            if all(
                abs(x + right - a) > half + width or abs(y + up - b) > 9 for a, b, width in taken
            )
        ]
        right, up = free[0] if free else around[0]
        taken.append((x + right, y + up, half))
        offsets.append((right, up))
    return offsets


def kept_attention(layers: Layers) -> Figure:
    """Draw the percentiles of kept attention, one bar per layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    names = [layer["layer"] for layer in layers]
    width, height = 7 + 0.07 * max(map(len, names)), 0.3 * len(layers) + 0.8
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    for row, layer in enumerate(layers):
        percentiles = [[head["kept"][str(p)] for p in PERCENTILES] for head in layer["heads"]]
        kept = np.array(percentiles)  # (H, percentiles)
        ends = kept.mean(0)
        axes.barh([row] * 3, np.diff(ends), left=ends[:-1], height=0.5, color=BLUES)
        axes.plot([ends[-1]] * 2, [row - 0.25, row + 0.25], color="black", linewidth=2)
        axes.vlines(kept[:, 0], row - 0.4, row + 0.4, color=ORANGE, linewidth=1)
    axes.set_yticks(range(len(layers)), names)
    axes.set(xlim=(0, 1.01), ylim=(len(layers) - 0.4, -0.6))
    axes.set_xlabel("share of a query's attention that is kept")
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.grid(True, axis="x", alpha=0.25)
    return figure

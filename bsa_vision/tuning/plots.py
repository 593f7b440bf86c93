"""The figures of a report, from the notes of a plan (see `findings.describe`). Needs matplotlib, and no display."""

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

Layers = Sequence[Mapping[str, Any]]  # as the notes hold them

BLUES, ORANGE, GREY = (
    ("#a6cee3", "#5ba3cf", "#0072b2"),
    "#d55e00",
    "#666666",
)  # everybody can tell them apart
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names may hold $
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Inside, figures look the same whatever the user's settings are."""
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError(
            f"a report is drawn with matplotlib, which cannot be imported ({error}): plans can be tuned and used without it; for the page, "
            "pip install 'bsa-vision[tune]'."
        ) from None
    with style.context(["default", STYLE]):
        yield


def inline(figure: Figure, name: str, caption: str, kind: str = "figure") -> str:
    """A figure as SVG, its ids beginning with `name`: those of several figures would be the same."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(
            out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(
        r"<[^>]*>", lambda tag: re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag[0]), svg
    )
    return f'<figure class="{kind}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def sparsity_map(layers: Layers) -> Figure:
    from matplotlib.figure import Figure

    skipped = np.array([[1 - head["density"] for head in one["heads"]] for one in layers])  # (L, H)
    (rows, columns), names = skipped.shape, [one["layer"] for one in layers]
    figure = Figure(
        (0.66 * columns + 0.085 * max(map(len, names)) + 0.4, 0.45 * rows + 0.7),
        layout="constrained",
    )
    axes = figure.subplots()
    axes.pcolormesh(skipped, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    for (row, column), value in np.ndenumerate(skipped):
        colour = "black" if value > 0.45 else "white"
        below = _short(layers[row]["heads"][column]["pattern"])
        axes.text(column + 0.5, row + 0.4, f"{value:.0%}", color=colour, ha="center", va="bottom")
        axes.text(
            column + 0.5,
            row + 0.46,
            below,
            color=colour,
            ha="center",
            va="top",
            fontsize=6,
            linespacing=1,
        )
    axes.set_xticks(np.arange(columns) + 0.5, list(map(str, range(columns))))
    axes.set_yticks(np.arange(rows) + 0.5, names)
    axes.set_xlabel("head")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _short(pattern: str) -> str:
    """For a small field: (local_window(radius=1) | strided(stride=4)) is "local 1", and below it "+ strided 4"."""
    parts = re.findall(r"(\w+)\(([^()]*)\)", pattern) or [(pattern, "")]
    lines = [
        " ".join([name.removesuffix("_window"), *re.findall(r"=([^,]*)", values)])
        for name, values in parts
    ]
    return "\n+ ".join(line if len(line) <= 10 else line[:9] + "…" for line in lines[:2])


def curve(tuned: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure((7, 4.2), layout="constrained")
    axes = figure.subplots()
    at, tried, limit = tuned["sparsity"], tuned["tried"], tuned["asked"].get("max_error")
    run, errors = [one["sparsity"] for one in tried], [one["measured"] for one in tried]
    axes.plot(*zip((0, 0), *tuned["curve"], strict=True), color=GREY, label="predicted")
    axes.plot(run, errors, "o", color=ORANGE, ms=4, label="tried, measured")
    axes.plot([at, at], [tuned["predicted"], tuned["measured"]], color=ORANGE, linewidth=1)
    axes.plot(at, tuned["predicted"], "x", color="black", ms=7, label="chosen, predicted")
    axes.plot(
        at, tuned["measured"], "o", color=ORANGE, mec="black", ms=10, label="chosen, measured"
    )
    if limit is not None:
        axes.axhline(limit, color="black", linewidth=1, linestyle=(0, (4, 3)), label="asked for")
    largest = max(tuned["predicted"], limit or 0, *errors)
    axes.set(
        xlim=(0, 1), ylim=(0, 2.5 * largest or 1)
    )  # the line goes on to plans that nobody asked for
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.set_xlabel("blocks skipped")
    axes.set_ylabel("relative L2 error of the target")
    axes.legend(frameon=False, loc="upper left")
    return figure


def by_layer(layers: Layers) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    side, shown = 4.6, [one for one in layers if min(one["predicted"], one["measured"]) > 0]
    figure = Figure((side + 1, side + 0.8), layout="constrained")
    axes = figure.subplots()
    points = np.array([[one["predicted"], one["measured"]] for one in shown]).reshape(-1, 2)
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
    labels, places = _labels(shown), np.log(points / low) / math.log(high / low) * side * 72  # pt
    for point, offset, label in zip(points, _free_places(places, labels), labels, strict=True):
        line = dict(arrowstyle="-", color=GREY, linewidth=0.5, shrinkA=0, shrinkB=3)
        axes.annotate(
            label,
            tuple(point),
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            arrowprops=line,
        )
    return figure


def _labels(layers: Layers) -> list[str]:
    """Keys of layers; numbers where all play one role."""
    keys = [one["key"] for one in layers]
    one_role = len({key.rpartition(".")[0] for key in keys}) == 1
    return [key.rpartition(".")[2] for key in keys] if one_role else keys


def _free_places(points: np.ndarray, labels: Sequence[str]) -> list[tuple[float, float]]:
    """For each point (P, 2), in pt: how far from it the middle of its label goes, so that none covers another, or a point."""
    taken = [(x, y, 3.0) for x, y in points]  # middle, half the width
    offsets = []
    for (x, y), label in zip(points, labels, strict=True):
        half = 2.5 * len(label) + 1
        away = 3 * math.pi / 4 if y > x else -math.pi / 4  # from the diagonal
        turns = [away + sign * step * math.pi / 6 for step in range(7) for sign in (1, -1)]
        around = [
            (math.cos(t) * (far + half), math.sin(t) * far)
            for far in (8, 14, 21, 29, 38)
            for t in turns
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
    """A bar for each layer, from its smallest to its largest percentile."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    names = [one["layer"] for one in layers]
    figure = Figure(
        (7 + 0.07 * max(map(len, names)), 0.3 * len(layers) + 0.8), layout="constrained"
    )
    axes = figure.subplots()
    for row, one in enumerate(layers):
        kept = np.array(
            [[head["kept"][str(p)] for p in PERCENTILES] for head in one["heads"]]
        )  # (H, percentiles)
        ends = kept.mean(0)
        axes.barh([row] * 3, np.diff(ends), left=ends[:-1], height=0.5, color=BLUES)
        axes.plot([ends[-1]] * 2, [row - 0.25, row + 0.25], color="black", linewidth=2)
        axes.vlines(kept[:, 0], row - 0.4, row + 0.4, color=ORANGE, linewidth=1)
    axes.set_yticks(range(len(layers)), names)
    axes.set(
        xlim=(0, 1.01),
        ylim=(len(layers) - 0.4, -0.6),
        xlabel="share of a query's attention that is kept",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.grid(True, axis="x", alpha=0.25)
    return figure

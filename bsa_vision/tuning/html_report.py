"""Draw the results of tuning, `plan.notes["tuned"]`, as one self-contained HTML page.

Needs matplotlib. `report_data.describe` documents the results.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from torch import nn

from bsa_vision.masks.layout import whole_number
from bsa_vision.models.features import features
from bsa_vision.plans.plan import SparsityPlan, as_plan
from bsa_vision.storage import atomic_write
from bsa_vision.tuning.attention_views import choose_heads, draw, head_views, pixels_of
from bsa_vision.tuning.bounds import MEAN_CONFIDENCE
from bsa_vision.tuning.plots import (
    Layers,
    by_layer,
    curve,
    drawing,
    inline,
    kept_attention,
    sparsity_map,
)
from bsa_vision.tuning.trial import Target

NEEDED = {
    *("asked", "images", "grid", "special_tokens", "sparsity", "predicted", "measured", "bound"),
    *("speedup", "errors", "certificate", "orders", "tried", "curve", "correlation", "layers"),
}
BUDGETS = {
    "sparsity": "skip {:.1%} of the blocks, at the least error",
    "max_error": "skip as many blocks as a mean error of at most {:.3g} allows",
    "speedup": "{:.3g} times as fast as dense attention, at the least error",
}
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; background: #fff; color: #1a1a1a;
 font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
figure { margin: 0 0 1rem; overflow-x: auto; }
figcaption, .note { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
svg { display: block; max-width: 100%; min-width: 30rem; height: auto; }
.wide svg { max-width: none; }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr));
 gap: 1rem; }
.view img { display: block; width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
 margin: .5rem 0 1rem; }
th, td { padding: .15rem .75rem .15rem 0; text-align: left; border-bottom: 1px solid #ddd;
 white-space: nowrap; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def report(
    plan: SparsityPlan | str | os.PathLike[str],
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    image: Any = None,
    *,
    target: Target = features,
    views: int = 6,
) -> None:
    """Write an HTML page about a plan that `tune` made: predicted and measured errors, every head.

    plan           the plan, or its path
    path           of the page, in an existing directory
    model, image   both or neither: a model without sparse heads and one input of `target`, to show
                   the attention of single heads on the image
    target         (model, image) -> features, as in `tune`
    views          largest number of heads to show on the image, from the largest predicted error
                   to the smallest

    The page needs no network and no scripts. An existing page is replaced only if everything
    succeeds. Needs matplotlib. Raise ValueError if the plan has no results of `tune`.
    """
    plan = as_plan(plan)
    tuned = plan.notes.get("tuned")
    if not isinstance(tuned, Mapping) or not tuned.keys() >= NEEDED:
        raise ValueError(
            f"the plan's notes hold {', '.join(map(repr, plan.notes)) or 'nothing'}: expected the "
            "results of tune under 'tuned'; make the plan with this version's bsa.tune."
        )
    atomic_write.check_folder(path)  # fail before drawing
    if (model is None) != (image is None):
        given, missing = ("an image", "model") if model is None else ("a model", "image")
        raise ValueError(
            f"report got {given} but no {missing}: views need both; pass {missing} too."
        )
    views = whole_number("views", views, 0)
    with drawing():
        parts = [*_text(plan, tuned), *_figures(tuned), *_orders(tuned["orders"])]
        if model is not None:
            parts += _views(plan, tuned["layers"], model, image, target, views)
    title = escape(
        f"Tuned plan: {plan.model['family']}, {tuned['sparsity']:.1%} of the blocks skipped"
    )
    body = "\n".join([*parts, *_numbers(tuned)])
    atomic_write.write(path, PAGE.substitute(title=title, body=body).encode())


# Text


def _text(plan: SparsityPlan, tuned: Mapping[str, Any]) -> list[str]:
    images, grid, special = tuned["images"], tuned["grid"], tuned["special_tokens"]
    model = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plan.model.items())
    counts = f"{images['calibration']} calibration, {images['held_out']} held out"
    rows = [
        ("model", model),
        ("tokens", f"{grid[0]} x {grid[1]} patches, {_count(special, 'special token')}"),
        ("token order", _order(plan.order, plan.tile)),
        ("block size", f"{plan.block_size} tokens"),
        ("images", f"{counts}, seed {images['seed']}"),
    ]
    parts = [f"<p>{escape(_summary(tuned))}</p>", _table((), rows)]
    changed = len(_changed(plan, tuned["layers"]))
    if changed:
        parts.append(
            f'<p class="note">{_count(changed, "head")} changed after tuning. The figures show the '
            "plan as tuned.</p>"
        )
    return [*parts, "<h2>Error on new images</h2>", f"<p>{escape(_certificate(tuned))}</p>"]


def _changed(plan: SparsityPlan, layers: Layers) -> set[tuple[str, int]]:
    """Return (layer key, head) of the heads whose pattern is not the tuned one."""
    return {
        (layer["key"], number)
        for layer in layers
        for number, (name, head) in enumerate(
            zip(plan.layers.get(layer["key"], ()), layer["heads"], strict=False)
        )
        if name != (f"{layer['key']}/{number}" if head["pattern"] == "static" else head["pattern"])
    }


def _summary(tuned: Mapping[str, Any]) -> str:
    ((name, wanted),) = tuned["asked"].items()
    held_out, speedup, layers = tuned["images"]["held_out"], tuned["speedup"], len(tuned["layers"])
    mean = "mean relative" if held_out > 1 else "relative"
    sentences = [
        f"Budget: {BUDGETS[name].format(wanted)} ({name}={wanted:g}).",
        f"The plan skips {tuned['sparsity']:.1%} of the blocks of {_count(layers, 'layer')}.",
        f"On {_count(held_out, 'held-out image')} the {mean} L2 error of the target is "
        f"{tuned['measured']:.3g} (predicted: {tuned['predicted']:.3g}).",
    ]
    if held_out > 1:
        sentences.append(
            f"The mean over all images like these is at most {tuned['bound']:.3g}, with "
            f"{MEAN_CONFIDENCE:.0%} confidence."
        )
    if speedup is not None:
        sentences.append(f"Measured speed-up of the target over dense: {speedup:.3g}.")
    return " ".join(sentences)


def _certificate(tuned: Mapping[str, Any]) -> str:
    """Return the bound on the share of images above the limit as text; the share is rounded up."""
    found = tuned["certificate"]
    limit, share = f"{found['limit']:.3g}", math.ceil(round(1000 * found["share"], 6)) / 10
    sentences = [
        f"Of {_count(found['images'], 'held-out image')}, {found['above']} had an error above "
        f"{limit}.",
        f"With {found['confidence']:.0%} confidence, at most {share:.1f}% of images like these "
        f"have an error above {limit} (Clopper-Pearson bound).",
    ]
    if "max_error" not in tuned["asked"]:
        sentences.append("No max_error was given, so this limit is the largest error measured.")
    if found["adjusted"]:
        sentences.append(
            "The plan was adjusted on these images, so the bound is slightly optimistic."
        )
    return " ".join(sentences)


def _orders(orders: Layers) -> list[str]:
    if not orders:
        return []
    best = min(orders, key=lambda order: order["lost"])
    rows = [
        (_order(order["order"], order["tile"]), f"{order['lost']:.3g}", "chosen" * (order is best))
        for order in orders
    ]
    heads = ("token order", "expected relative squared error, mean over layers", "")
    return ["<h2>Token orders compared</h2>", _table(heads, rows)]


def _numbers(tuned: Mapping[str, Any]) -> list[str]:
    """Return all numbers as tables, collapsed by default."""
    heads = [
        (
            layer["layer"],
            number,
            head["pattern"],
            head["density"],
            head["error"],
            head["kept"]["1"],
            head["kept"]["50"],
        )
        for layer in tuned["layers"]
        for number, head in enumerate(layer["heads"])
    ]
    errors = ("weight", "predicted", "measured")
    layers = [
        (layer["layer"], layer["key"], *(layer[name] for name in errors))
        for layer in tuned["layers"]
    ]
    columns = ("asked", "sparsity", "predicted", "measured", "speedup")
    trials = [[trial.get(name, "") for name in columns] for trial in tuned["tried"]]
    kept = ("attention kept by 99% of queries", "by 50%")
    return [
        "<details><summary>All numbers</summary>",
        _table(("layer", "head", "pattern", "density", "predicted error", *kept), heads),
        _table(("layer", "key", *errors), layers),
        _table(("trial: limit for the solver", *columns[1:]), trials),
        _table(("held-out image", "error"), list(enumerate(tuned["errors"]))),
        "</details>",
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def row(tag: str, cells: Iterable[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    top = row("th", heads) if heads else ""
    body = "".join(
        row("td", (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
        for cells in rows
    )
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def _order(order: str, tile: Sequence[int]) -> str:
    return f"{order}, tiles of {tile[0]} x {tile[1]} patches" if order == "tile" else order


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


# Figures


def _figures(tuned: Mapping[str, Any]) -> list[str]:
    layers, known = tuned["layers"], tuned["correlation"]
    correlation = "" if known is None else f", correlation {known:.2f}"
    return [
        "<h2>Blocks skipped, by layer and head</h2>",
        inline(
            sparsity_map(layers),
            "heads",
            "Rows are layers, columns are heads. The pattern is written below each share.",
            "wide",
        ),
        "<h2>Error against sparsity</h2>",
        inline(
            curve(tuned),
            "curve",
            "The line is the predicted error of the best plans. Points are plans that were run.",
        ),
        f"<h2>Predicted and measured error, by layer{correlation}</h2>",
        inline(
            by_layer(layers),
            "layers",
            "Error of each layer's output for the same input. Layers without error are omitted.",
        ),
        "<h2>Attention kept</h2>",
        inline(
            kept_attention(layers),
            "kept",
            "99% of queries keep more than the left end of a bar, 95% more than its first step, "
            "75% more than its second, half of them more than its right end (means over heads). "
            "Orange strokes: what 99% of the queries of a single head keep. Dense heads keep all "
            "attention.",
        ),
    ]


def _views(
    plan: SparsityPlan, layers: Layers, model: nn.Module, image: Any, target: Target, views: int
) -> list[str]:
    pixels, chosen = pixels_of(image), choose_heads(layers, views)
    if not chosen:
        return []
    heads = [(layers[index]["key"], head) for index, head in chosen]
    changed, figures = _changed(plan, layers), []
    for (index, number), view in zip(
        chosen, head_views(plan, model, image, heads, target), strict=True
    ):
        head, key = layers[index]["heads"][number], layers[index]["key"]
        if (key, number) in changed:
            about = f"changed to {plan.layers[key][number]} after tuning"
        else:
            about = (
                f"{head['pattern']}, {1 - head['density']:.0%} skipped, predicted error "
                f"{head['error']:.3g}"
            )
        text = escape(
            f"{view.view.title}: {about}. The query keeps {view.kept:.0%} of its attention."
        )
        out = io.BytesIO()
        draw(pixels, view).savefig(out, format="png")
        source = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
        picture = f'<img src="{source}" alt="{text}">'
        figures.append(f'<figure class="view">{picture}<figcaption>{text}</figcaption></figure>')
    note = (
        "The cross marks one query, in the middle of the image. Colours from violet to yellow show "
        "its attention if nothing is skipped. Its block is outlined in white, and patches that "
        "this block skips are dark."
    )
    return [
        "<h2>Attention of single heads</h2>",
        f'<p class="note">{note}</p>',
        '<div class="views">',
        *figures,
        "</div>",
    ]

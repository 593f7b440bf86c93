"""What tuning found, as one HTML page: drawn from `plan.notes["tuned"]` (see `findings.describe`), complete in itself. Needs matplotlib."""

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
from bsa_vision.tuning.attention_views import choose, look, photograph, pixels_of
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
    *(
        "asked",
        "images",
        "grid",
        "special tokens",
        "sparsity",
        "predicted",
        "measured",
        "bound",
        "speedup",
        "errors",
    ),
    *("certificate", "orders", "tried", "curve", "correlation", "layers"),
}
ASKED = {
    "sparsity": "to skip {:.1%} of the blocks at the least error",
    "max_error": "to skip as many blocks as a mean error of at most {:.3g} allows",
    "speedup": "to be {:.3g} times as fast as dense attention at the least error",
}
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; background: #fff; color: #1a1a1a; font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
figure { margin: 0 0 1rem; overflow-x: auto; }
figcaption, .note { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
svg { display: block; max-width: 100%; min-width: 30rem; height: auto; }
.wide svg { max-width: none; }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
.view img { display: block; width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
th, td { padding: .15rem .75rem .15rem 0; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
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
    """Write one HTML page about a plan that `tune` made: what was predicted and measured, head by head. It needs no network and no script.

    plan           that `tune` made, or its path
    path           of the page, in a folder that is there
    model, image   both or none: a model without sparse heads, and one image as `target` takes it, for photographs with what heads see
    target         (model, image) -> features, as in `tune`
    views          how many heads to show that way, at most: from the largest expected error to the least

    ValueError for a plan without such notes; whatever goes wrong, a page that was there before is still there. Needs matplotlib.
    """
    plan = as_plan(plan)
    tuned = plan.notes.get("tuned")
    if not isinstance(tuned, Mapping) or not tuned.keys() >= NEEDED:
        raise ValueError(
            f"the plan's notes hold {', '.join(map(repr, plan.notes)) or 'nothing'}: a report needs what tune leaves there under 'tuned'; "
            "make the plan with this version's bsa.tune."
        )
    atomic_write.check_folder(path)  # before views are drawn
    if (model is None) != (image is None):
        given, missing = ("an image", "model") if model is None else ("a model", "image")
        raise ValueError(
            f"report got {given} and no {missing}: views need both, the rest neither; pass {missing} too."
        )
    views = whole_number("views", views, 0)
    with drawing():
        parts = [*_text(plan, tuned), *_figures(tuned), *_orders(tuned["orders"])]
        if model is not None:
            parts += _views(plan, tuned["layers"], model, image, target, views)
    title = escape(
        f"Tuned plan: {plan.model['family']}, {tuned['sparsity']:.1%} of the blocks skipped"
    )
    atomic_write.write(
        path, PAGE.substitute(title=title, body="\n".join([*parts, *_numbers(tuned)])).encode()
    )


# Text


def _text(plan: SparsityPlan, tuned: Mapping[str, Any]) -> list[str]:
    images, grid, special = tuned["images"], tuned["grid"], tuned["special_tokens"]
    rows = [
        (
            "model",
            ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plan.model.items()),
        ),
        ("tokens", f"{grid[0]} x {grid[1]} patches, {_count(special, 'special token')}"),
        (
            "token layout",
            f"order {_order(plan.order, plan.tile)}, blocks of {plan.block_size} tokens",
        ),
        (
            "images",
            f"chosen on {images['calibration']}, kept back {images['held_out']}, seed {images['seed']}",
        ),
    ]
    parts = [f"<p>{escape(_summary(tuned))}</p>", _table((), rows)]
    changed = _changed(plan, tuned["layers"])
    if changed:
        parts.append(
            f'<p class="note">{len(changed)} heads name other patterns since: figures show the plan as tuned.</p>'
        )
    return [*parts, "<h2>Other images</h2>", f"<p>{escape(_certificate(tuned))}</p>"]


def _changed(plan: SparsityPlan, layers: Layers) -> set[tuple[str, int]]:
    """Layer and number of the heads that have another pattern than the one that was tuned."""
    return {
        (one["key"], number)
        for one in layers
        for number, (name, head) in enumerate(
            zip(plan.layers.get(one["key"], ()), one["heads"], strict=False)
        )
        if name != (f"{one['key']}/{number}" if head["pattern"] == "static" else head["pattern"])
    }


def _summary(tuned: Mapping[str, Any]) -> str:
    ((name, wanted),) = tuned["asked"].items()
    back, speedup = tuned["images"]["held_out"], tuned["speedup"]
    said = [
        f"Asked for was {ASKED[name].format(wanted)} ({name}={wanted:g}).",
        f"The plan skips {tuned['sparsity']:.1%} of the blocks of {_count(len(tuned['layers']), 'layer')}.",
        f"On {_count(back, 'image')} kept back, the relative L2 error of the target is {tuned['measured']:.3g}{' in the mean' * (back > 1)}; "
        f"{tuned['predicted']:.3g} was predicted.",
    ]
    if back > 1:
        said.append(
            f"The mean over all images like these is at most {tuned['bound']:.3g}, with {MEAN_CONFIDENCE:.0%} confidence."
        )
    if speedup is not None:
        said.append(f"Measured while tuning, the target runs {speedup:.3g} times as fast as dense.")
    return " ".join(said)


def _certificate(tuned: Mapping[str, Any]) -> str:
    """In words; the share is rounded up, so that what is said is true."""
    found = tuned["certificate"]
    limit, share = f"{found['limit']:.3g}", math.ceil(round(1000 * found["share"], 6)) / 10
    said = [
        f"Of {_count(found['images'], 'image')} kept back, {found['above']} had an error above {limit}: with {found['confidence']:.0%} "
        f"confidence at most {share:.1f}% of images like these have an error above {limit} (Clopper and Pearson's bound)."
    ]
    if "max_error" not in tuned["asked"]:
        said.append("No limit was asked for: this one is the largest error seen.")
    if found["adjusted"]:
        said.append(
            "The plan was adjusted on these same images, so the figure is slightly optimistic."
        )
    return " ".join(said)


def _orders(orders: Layers) -> list[str]:
    if not orders:
        return []
    best = min(orders, key=lambda one: one["lost"])
    rows = [
        (_order(one["order"], one["tile"]), f"{one['lost']:.3g}", "chosen" * (one is best))
        for one in orders
    ]
    heads = ("order of tokens", "squared error expected, as a share, mean over layers", "")
    return ["<h2>Orders compared</h2>", _table(heads, rows)]


def _numbers(tuned: Mapping[str, Any]) -> list[str]:
    """Every number, folded away."""
    errors, trials = (
        ("weight", "predicted", "measured"),
        ("asked", "sparsity", "predicted", "measured", "speedup"),
    )
    heads = [
        (
            one["layer"],
            number,
            head["pattern"],
            head["density"],
            head["error"],
            head["kept"]["1"],
            head["kept"]["50"],
        )
        for one in tuned["layers"]
        for number, head in enumerate(one["heads"])
    ]
    layers = [
        (one["layer"], one["key"], *(one[name] for name in errors)) for one in tuned["layers"]
    ]
    return [
        "<details><summary>Every number</summary>",
        _table(
            ("layer", "head", "pattern", "density", "expected error", "kept, 1%", "kept, 50%"),
            heads,
        ),
        _table(("layer", "key", *errors), layers),
        _table(
            ("tried: asked", *trials[1:]),
            [[one.get(name, "") for name in trials] for one in tuned["tried"]],
        ),
        _table(("image kept back", "error"), list(enumerate(tuned["errors"]))),
        "</details>",
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    top = f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>" if heads else ""
    texts = [
        [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in texts
    )
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def _order(order: str, tile: Sequence[int]) -> str:
    return f"{order}, tiles of {tile[0]} x {tile[1]} patches" if order == "tile" else order


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def _figures(tuned: Mapping[str, Any]) -> list[str]:
    layers, known = tuned["layers"], tuned["correlation"]
    correlation = "" if known is None else f", correlation {known:.2f}"
    return [
        "<h2>Blocks skipped, by layer and head</h2>",
        inline(sparsity_map(layers), "heads", "Rows are layers, columns heads. Below each share: the pattern.", "wide"),
        "<h2>Error against sparsity</h2>",
        inline(curve(tuned), "curve", "The line is what the best plans are expected to cost; points are plans that were run."),
        f"<h2>Predicted and measured error, by layer{correlation}</h2>",
        inline(by_layer(layers), "layers", "Of what each layer returns for the input it gets. Layers without error are left out."),
        "<h2>Attention that is kept</h2>",
        inline(
            kept_attention(layers),
            "kept",
            "99% of queries keep more than the left end of a bar, 95% more than its first step, 75% more than its second, half of them more than "
            "its right end: means over heads. Strokes are single heads: what 99% of queries keep. Dense heads keep everything.",
        ),
    ]  # fmt: skip


def _views(
    plan: SparsityPlan, layers: Layers, model: nn.Module, image: Any, target: Target, views: int
) -> list[str]:
    pixels, chosen = pixels_of(image), choose(layers, views)
    if not chosen:
        return []
    shown, changed = [], _changed(plan, layers)
    sights = look(
        plan, model, image, [(layers[index]["key"], head) for index, head in chosen], target
    )
    for (index, head), sight in zip(chosen, sights, strict=True):
        about, key = layers[index]["heads"][head], layers[index]["key"]
        said = f"{about['pattern']}, {1 - about['density']:.0%} skipped, expected error {about['error']:.3g}"
        if (key, head) in changed:
            said = f"{plan.layers[key][head]} since the plan was tuned"
        text = escape(
            f"{sight.view.title}: {said}. This query keeps {sight.kept:.0%} of its attention."
        )
        out = io.BytesIO()
        photograph(pixels, sight).savefig(out, format="png")
        source = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
        picture = f'<img src="{source}" alt="{text}">'
        shown.append(f'<figure class="view">{picture}<figcaption>{text}</figcaption></figure>')
    note = (
        "One query, the cross in the middle. Colour is the attention that it pays when nothing is skipped, from violet to yellow; dark is what "
        "its block, outlined in white, no longer sees."
    )
    return [
        "<h2>What single heads see</h2>",
        f'<p class="note">{note}</p>',
        '<div class="views">',
        *shown,
        "</div>",
    ]

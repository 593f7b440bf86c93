"""Make heads and layers dense that gain nothing on a machine: a decision written into the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bsa_vision.attention.mask_tensors import DENSE
from bsa_vision.measure.latency import Latency
from bsa_vision.measure.latency import latency as latency_here
from bsa_vision.plans.model_spec import ModelSpec
from bsa_vision.plans.plan import SparsityPlan


def prune(
    plan: SparsityPlan,
    spec: ModelSpec,
    *,
    latency: Latency | None = None,
    grid: tuple[int, int] | None = None,
    images: int = 1,
    min_gain: float = 0.05,
) -> SparsityPlan:
    """Return `plan` with the heads made dense that save too little time on this machine.

    spec      of the model: `bsa.inspect(model)`
    latency   what attention costs here; None = `bsa.latency(head_dim)`: float32 on the CPU,
              measured once
    grid      (h, w) patches of the inputs to come, None = the model's own
    images    per call
    min_gain  the fraction of a dense head's time that a sparse one must save, 0 to 1

    A layer whose whole call would save less than that becomes dense altogether. The notes say what
    was made dense, and for which machine.
    """
    if not isinstance(spec, ModelSpec):
        raise TypeError(
            f"spec is a {type(spec).__name__}: expected a ModelSpec; pass bsa.inspect(model)."
        )
    if (
        isinstance(min_gain, bool)
        or not isinstance(min_gain, (int, float))
        or not 0 <= min_gain < 1
    ):
        raise ValueError(
            f"min_gain={min_gain!r}: expected a fraction of the dense time, from 0 to below 1; give e.g. 0.05."
        )
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ValueError(
            f"images={images!r}: expected the number of images per call, at least 1; give e.g. 1."
        )
    plan.check(spec)
    latency = latency or latency_here(plan.model["head_dim"])
    layout = plan.layout(spec, grid)
    layers, made_dense = {}, {}
    for key, names in plan.layers.items():
        keys = plan.key_layout(spec.find(key), layout)
        masks = plan.compile(key, layout, keys=keys)
        heads = set(
            latency.better_dense(
                masks, layout.num_tokens, images, min_gain, (keys or layout).num_tokens
            )
        )
        # A pattern that skips nothing at this grid is computed dense already: say so.
        heads |= {
            h
            for h, name in enumerate(names)
            if name != "dense" and masks.slices[h] == DENSE and min_gain > 0
        }
        layers[key] = tuple("dense" if head in heads else name for head, name in enumerate(names))
        if heads:
            made_dense[key] = sorted(heads)
    used = {name for names in layers.values() for name in names}
    note: dict[str, Any] = {
        "for": latency.what,
        "grid": list(layout.grid),
        "images": images,
        "min_gain": min_gain,
    }
    return replace(
        plan,
        patterns={name: pattern for name, pattern in plan.patterns.items() if name in used},
        layers=layers,
        notes={**plan.notes, "pruned": {**note, "made_dense": made_dense}},
    )

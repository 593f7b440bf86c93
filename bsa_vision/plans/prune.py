"""Heads and layers that gain nothing on a machine, made dense: a decision taken when planning, and written into the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bsa_vision.attention.head_masks import DENSE, HeadMasks
from bsa_vision.measure.latency import Latency
from bsa_vision.plans.model_spec import ModelSpec
from bsa_vision.plans.plan import SparsityPlan


def prune(
    plan: SparsityPlan,
    spec: ModelSpec,
    latency: Latency,
    grid: tuple[int, int] | None = None,
    images: int = 1,
    min_gain: float = 0.05,
) -> SparsityPlan:
    """See `SparsityPlan.prune`."""
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
    layout = plan.layout(spec, grid)
    layers, made_dense = {}, {}
    for key, names in plan.layers.items():
        keys = plan.key_layout(spec.find(key), layout)
        masks = plan.compile(key, layout, keys=keys)
        heads = set(
            better_dense(
                masks, layout.num_tokens, latency, images, min_gain, (keys or layout).num_tokens
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


def better_dense(
    masks: HeadMasks,
    tokens: int,
    latency: Latency,
    images: int = 1,
    min_gain: float = 0.0,
    keys: int = 0,
) -> tuple[int, ...]:
    """The sparse heads that save less than `min_gain` of a dense head's time; all of them where the whole call does."""
    dense_heads = HeadMasks(None, [DENSE] * masks.num_heads, block_size=masks.block_size)
    alone = latency.of_heads(dense_heads, tokens, keys)
    seconds = latency.of_heads(masks, tokens, keys)
    sparse = [head for head, kind in enumerate(masks.slices) if kind != DENSE]
    slow = [head for head in sparse if seconds[head] >= (1 - min_gain) * alone[head]]
    rest = latency.sparse_call + images * sum(
        alone[h] if h in slow else seconds[h] for h in range(masks.num_heads)
    )
    pays = len(slow) < len(sparse) and rest < (1 - min_gain) * latency.dense(
        masks.num_heads, tokens, images, keys
    )
    return tuple(slow if pays else sparse)

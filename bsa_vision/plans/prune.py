"""Replace sparse heads and layers by dense ones where sparsity saves too little time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bsa_vision.attention.mask_tensors import DENSE
from bsa_vision.measure.latency import Latency
from bsa_vision.measure.latency import latency as measured_latency
from bsa_vision.plans.model_spec import ModelSpec
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.plans.validation import check_spec


def prune(
    plan: SparsityPlan,
    spec: ModelSpec,
    *,
    latency: Latency | None = None,
    grid: tuple[int, int] | None = None,
    images: int = 1,
    min_gain: float = 0.05,
) -> SparsityPlan:
    """Return `plan` with those heads made dense that save too little time on this machine.

    spec      the model's spec: `bsa.inspect(model)`
    latency   latency model of this machine; None = `bsa.latency(head_dim)`, which measures float32
              on the CPU once
    grid      (h, w) patches of the expected inputs; None = the model's own
    images    number of images per call
    min_gain  the fraction of a dense head's time that a sparse head must save, 0 to 1

    A layer becomes dense altogether if its whole call would save less than `min_gain`. The notes
    of the plan list the heads that were made dense, and for which machine.
    """
    check_spec(spec)
    number = isinstance(min_gain, (int, float)) and not isinstance(min_gain, bool)
    if not number or not 0 <= min_gain < 1:
        raise ValueError(
            f"min_gain={min_gain!r}: expected a fraction of the dense time, 0 <= min_gain < 1."
        )
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ValueError(f"images={images!r}: expected the number of images per call, an int >= 1.")
    plan.check(spec)
    latency = latency or measured_latency(plan.model["head_dim"])
    layout = plan.layout(spec, grid)
    layers, made_dense = {}, {}
    for key, names in plan.layers.items():
        keys = plan.key_layout(spec.find(key), layout)
        masks = plan.compile(key, layout, keys=keys)
        num_keys = (keys or layout).num_tokens
        heads = set(latency.better_dense(masks, layout.num_tokens, images, min_gain, num_keys))
        # Patterns that skip no block at this grid run dense already. Say so in the plan.
        if min_gain > 0:
            heads |= {
                head
                for head, name in enumerate(names)
                if name != "dense" and masks.slices[head] == DENSE
            }
        layers[key] = tuple("dense" if head in heads else name for head, name in enumerate(names))
        if heads:
            made_dense[key] = sorted(heads)
    used = {name for names in layers.values() for name in names}
    pruned: dict[str, Any] = {
        "for": latency.what,
        "grid": list(layout.grid),
        "images": images,
        "min_gain": min_gain,
        "made_dense": made_dense,
    }
    return replace(
        plan,
        patterns={name: pattern for name, pattern in plan.patterns.items() if name in used},
        layers=layers,
        notes={**plan.notes, "pruned": pruned},
    )

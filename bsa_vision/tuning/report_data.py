"""What tuning found, as plain data: kept in the plan's notes, drawn by `page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bsa_vision.tuning.bounds import CONFIDENCE, share_above
from bsa_vision.tuning.statistics import BINS
from bsa_vision.tuning.trial import Trial, Tuned

PERCENTILES = (1, 5, 25, 50)


def describe(
    tuned: Tuned,
    best: Trial,
    tried: Sequence[Trial],
    asked: Mapping[str, float],
    images: Mapping[str, int],
    orders: Sequence[Mapping[str, Any]],
    layer_errors: Sequence[float],
    curve: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """JSON-able. Errors are relative L2; densities and sparsities are shares of the blocks.

    asked, images      the budget; how many images were chosen on and kept back, and the seed of that
    grid               patches of an image (h, w), and how many special tokens besides
    sparsity           of all tuned layers together
    predicted          error of the target that was expected
    measured, errors   on the images kept back: the mean, and one by one; bound: what the mean of all such images is at most, 99 %;
                       None of a single image
    images above       those with an error above the one asked for; None where none was
    certificate        what share of all such images is above `limit` at most, by Clopper and Pearson
    orders             what each order of tokens would lose, where orders were compared: squared error of layers without all but their best
                       blocks, as a share, mean over layers and over 25 % and 50 % of the blocks; the least is chosen
    tried              plans that were run on the way; asked is what the solver was asked for: a sparsity, an error, a share of the time
    curve              sparsity and predicted error of the best plans
    layers             per layer: weight (squared error of the target over that of the layer), predicted and measured error of its
                       output, and per head the pattern, its density, the error it is expected to cause, percentiles over queries of the
                       attention that is kept
    """
    ((name, wanted),) = asked.items()
    limit = wanted if name == "max_error" else max(best.errors)
    above = sum(error > limit for error in best.errors)
    layers = [
        _layer(tuned, index, picks, measured)
        for index, (picks, measured) in enumerate(zip(best.picks, layer_errors, strict=True))
    ]
    return {
        "asked": dict(asked),
        "images": dict(images),
        "grid": list(tuned.layout.grid),
        "special_tokens": tuned.layout.num_prefix_tokens + tuned.layout.num_suffix_tokens,
        "sparsity": 1 - tuned.density(best.picks),
        "predicted": tuned.predicted(best.picks),
        "measured": best.measured,
        "bound": best.bound if len(best.errors) > 1 else None,
        "speedup": best.speedup,
        "errors": list(best.errors),
        "images_above": above if name == "max_error" else None,
        "certificate": {
            "images": len(best.errors),
            "limit": limit,
            "above": above,
            "share": share_above(len(best.errors), above),
            "confidence": CONFIDENCE,
            "adjusted": len(tried) > 1,
        },
        "orders": [dict(one) for one in orders],
        "tried": [
            {
                "asked": one.asked,
                "sparsity": 1 - tuned.density(one.picks),
                "predicted": tuned.predicted(one.picks),
                "measured": one.measured,
            }
            | ({} if one.speedup is None else {"speedup": one.speedup})
            for one in tried
        ],
        "curve": [list(point) for point in curve],
        "correlation": _correlation(
            [one["predicted"] for one in layers], [one["measured"] for one in layers]
        ),
        "layers": layers,
    }


def _layer(tuned: Tuned, index: int, picks: Sequence[int], measured: float) -> dict[str, Any]:
    alone, errors, layer = tuned.alone[index], tuned.errors[index], tuned.layers[index]
    heads = []
    for head, pick in enumerate(picks):
        pattern, mask = tuned.options[index][head][pick]
        static = type(pattern).__name__ == "Static"
        heads.append(
            {
                "pattern": "dense" if pattern is None else "static" if static else repr(pattern),
                "density": mask.double().mean().item(),
                "error": float(errors[head, pick]) ** 0.5,
                "kept": _percentiles(tuned.kept[index][head, pick], dense=pattern is None),
            }
        )
    most = int(alone.argmax())
    return {
        "layer": layer.name,
        "key": layer.key,
        "weight": float(errors.flatten()[most] / alone.flatten()[most].clamp(min=1e-300)),
        "predicted": float(sum(alone[head, pick] for head, pick in enumerate(picks))) ** 0.5,
        "measured": measured,
        "heads": heads,
    }


def _percentiles(counts: Tensor, dense: bool) -> dict[str, float]:
    """Of a histogram (BINS,): the lower end of the bin that each percentile falls into; the last bin cannot tell 1 from a little less."""
    reached = counts.cumsum(0) / counts.sum().clamp(min=1)
    bins = {
        str(p): int(torch.searchsorted(reached, torch.tensor(p / 100, dtype=reached.dtype)))
        for p in PERCENTILES
    }
    return {name: 1.0 if dense else found / BINS for name, found in bins.items()}


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's; None where one does not vary."""
    both = torch.tensor([a, b], dtype=torch.float64)
    if both.shape[1] < 2 or bool((both.std(1) == 0).any()):
        return None
    return float(torch.corrcoef(both)[0, 1])

"""The results of tuning as plain data, stored in the plan and drawn by `html_report`."""

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
    """Return JSON-able results; errors are relative L2, sparsities and densities shares of blocks.

    asked             the budget, {name: value}
    images            counts of calibration and held-out images, and the seed of the split
    grid              patches of an image (h, w)
    special_tokens    number of prefix and suffix tokens
    sparsity          of all tuned layers together
    predicted         predicted error of the target
    measured, errors  error of the target on held-out images: mean, and one by one
    bound             upper bound on the mean error of all such images, at 99 % confidence; None
                      for a single held-out image
    speedup           measured; None unless it is the budget
    images_above      number of held-out images with an error above max_error; None without one
    certificate       upper bound on the share of all such images with an error above `limit`
                      (Clopper and Pearson)
    orders            loss of each token order, if orders were compared: squared error of a layer
                      that keeps only the best blocks of each head, as a share, mean over layers and
                      over 25 % and 50 % of the blocks. The order of least loss is chosen
    tried             plans that were run; `asked` is the limit that the solver was given: a
                      sparsity, an error, or a share of the dense time
    curve             sparsity and predicted error of the best plans
    correlation       of the layers' predicted and measured errors; None if one does not vary
    layers            per layer: weight (squared error of the target over that of the layer),
                      predicted and measured error of its output, and per head its pattern, its
                      density, its predicted error and percentiles over queries of the attention
                      that is kept
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
        "orders": [dict(order) for order in orders],
        "tried": [_trial(tuned, trial) for trial in tried],
        "curve": [list(point) for point in curve],
        "correlation": _correlation(
            [layer["predicted"] for layer in layers], [layer["measured"] for layer in layers]
        ),
        "layers": layers,
    }


def _trial(tuned: Tuned, trial: Trial) -> dict[str, float]:
    found = {
        "asked": trial.asked,
        "sparsity": 1 - tuned.density(trial.picks),
        "predicted": tuned.predicted(trial.picks),
        "measured": trial.measured,
    }
    return found if trial.speedup is None else found | {"speedup": trial.speedup}


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
    """Return for each percentile of a histogram (BINS,) the lower end of its bin.

    The last bin cannot tell 1 from slightly less, so dense heads get exactly 1.
    """
    reached = counts.cumsum(0) / counts.sum().clamp(min=1)
    bins = {
        str(p): int(torch.searchsorted(reached, torch.tensor(p / 100, dtype=reached.dtype)))
        for p in PERCENTILES
    }
    return {name: 1.0 if dense else found / BINS for name, found in bins.items()}


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None if one of the sequences does not vary."""
    both = torch.tensor([a, b], dtype=torch.float64)
    if both.shape[1] < 2 or bool((both.std(1) == 0).any()):
        return None
    return float(torch.corrcoef(both)[0, 1])

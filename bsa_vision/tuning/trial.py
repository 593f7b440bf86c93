"""Turn choices of candidates into plans, run these plans and measure their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters.restore import dense
from bsa_vision.adapters.sparsify import sparse
from bsa_vision.compare import errors_alone
from bsa_vision.masks import TokenLayout
from bsa_vision.measure.timing import paired
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.plans.plan import PatternLike, SparsityPlan
from bsa_vision.tuning import distributed
from bsa_vision.tuning.bounds import mean_at_most

Target = Callable[[Any, Any], Tensor]
Picks = Sequence[Sequence[int]]  # [layer][head]: index of the candidate


@dataclass(frozen=True, eq=False)
class Tuned:
    """Results of the calibration passes, enough to choose a plan for any budget.

    options  [layer][head]: candidates as (pattern, mask); the first one is dense (pattern None)
    errors   [layer]: (H, K) predicted squared error of the target per candidate, as a share of
             the target's squared norm
    alone    [layer]: (H, K) squared error of the layer's output, as a share of its squared norm
    kept     [layer]: (H, K, BINS) histogram over queries of the share of attention that is kept
    """

    spec: ModelSpec
    layout: TokenLayout
    layers: tuple[LayerSpec, ...]
    options: tuple[tuple[tuple[tuple[PatternLike | None, Tensor], ...], ...], ...]
    errors: tuple[Tensor, ...]
    alone: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]

    def density(self, picks: Picks) -> float:
        """Return the share of the blocks of all tuned layers that are kept."""
        kept = [
            options[pick][1].double().mean().item()
            for heads, chosen in zip(self.options, picks, strict=True)
            for options, pick in zip(heads, chosen, strict=True)
        ]
        return sum(kept) / len(kept)

    def predicted(self, picks: Picks) -> float:
        """Return the predicted relative error of the target."""
        squared = sum(
            float(error[head, pick])
            for error, chosen in zip(self.errors, picks, strict=True)
            for head, pick in enumerate(chosen)
        )
        return squared**0.5


@dataclass(frozen=True)
class Trial:
    """A plan that was run on the held-out images.

    asked      limit that the solver was given
    errors     of the target, one per image
    speedup    measured; None unless it is the budget
    """

    asked: float
    picks: Picks
    plan: SparsityPlan
    errors: tuple[float, ...]
    speedup: float | None

    @property
    def measured(self) -> float:
        """Mean error of the held-out images."""
        return sum(self.errors) / len(self.errors)

    @property
    def bound(self) -> float:
        """Upper bound on the mean error of all such images, at 99 % confidence."""
        return mean_at_most(self.errors)


def make_plan(tuned: Tuned, picks: Picks) -> SparsityPlan:
    """Return the plan with these candidates."""
    patterns: dict[str, PatternLike] = {}
    layers = {layer.key: ("dense",) * layer.heads for layer in tuned.spec.layers}
    for layer, heads, chosen in zip(tuned.layers, tuned.options, picks, strict=True):
        names = []
        for head, (options, pick) in enumerate(zip(heads, chosen, strict=True)):
            pattern = options[pick][0]
            if pattern is None:
                names.append("dense")
                continue
            static = type(pattern).__name__ == "Static"
            names.append(f"{layer.key}/{head}" if static else repr(pattern))
            patterns[names[-1]] = pattern
        layers[layer.key] = tuple(names)
    layout = tuned.layout
    return SparsityPlan(
        tuned.spec.fingerprint, patterns, layers, layout.order, layout.tile, layout.block_size
    )


def target_errors(
    model: nn.Module,
    plan: SparsityPlan,
    images: Sequence[Any],
    references: Sequence[Tensor],
    target: Target,
) -> list[float]:
    """Return the relative L2 error of the target for every image of all processes.

    `images` and `references` (the dense targets) are those of this process.
    """
    with sparse(model, plan):
        outs = distributed.run_together(lambda: [target(model, image) for image in images])
    errors = [
        float((a - b).double().norm() / b.double().norm())
        for a, b in zip(outs, references, strict=True)
    ]
    errors = distributed.collect(errors)
    if not all(map(math.isfinite, errors)):
        raise ValueError(
            "the features of these images are not finite: check the images (NaN, infinite values) "
            "and the weights."
        )
    return errors


def layer_errors(
    model: nn.Module,
    plan: SparsityPlan,
    images: Sequence[Any],
    target: Target,
    layers: Sequence[LayerSpec],
) -> list[float]:
    """Return the relative L2 error of each layer's output, mean over the images of all processes.

    Every layer is compared with the dense layer on the same input. `images` are those of this
    process.
    """
    found: list[list[float]] = []
    with sparse(model, plan):
        for image in images:
            with errors_alone(model) as errors:
                target(model, image)
            found.append([sum(errors[layer.name]) / len(errors[layer.name]) for layer in layers])
    found = distributed.collect(found)
    return [sum(of_layer) / len(of_layer) for of_layer in zip(*found, strict=True)]


def time_plan(
    model: nn.Module, plan: SparsityPlan, image: Any, target: Target, rounds: int
) -> tuple[float, float]:
    """Return the speed-up of the target with this plan, and the seconds of the dense target.

    Both are medians of alternating runs, measured in the first process.
    """
    with sparse(model, plan):
        if distributed.rank_and_size()[0]:
            return distributed.broadcast((0.0, 0.0))
        times = paired(
            {"dense": lambda: _dense(model, image, target), "sparse": lambda: target(model, image)},
            rounds,
        )
        return distributed.broadcast((1 / times["sparse"].ratio, times["dense"].median))


def _dense(model: nn.Module, image: Any, target: Target) -> Tensor:
    with torch.no_grad(), dense(model):
        return target(model, image)

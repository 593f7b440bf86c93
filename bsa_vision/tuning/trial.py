"""Choices of candidates as plans, and what these plans do when they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters.api import dense, sparse
from bsa_vision.compare import errors_alone
from bsa_vision.masks import TokenLayout
from bsa_vision.measure.timing import paired
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.plans.plan import PatternLike, SparsityPlan
from bsa_vision.tuning import distributed
from bsa_vision.tuning.bounds import mean_at_most

Target = Callable[[Any, Any], Tensor]
Picks = Sequence[Sequence[int]]  # [layer][head]: which candidate


@dataclass(frozen=True, eq=False)
class Tuned:
    """What the passes found, from which plans for any budget follow.

    options  [layer][head]: candidates, the first one dense (pattern None)
    errors   [layer]: (H, K) squared error of the target, as a share of its squared length, that each candidate is expected to cause
    alone    [layer]: (H, K) squared error of the layer's output, as a share of its squared length
    kept     [layer]: (H, K, BINS) how many queries keep which share of their attention
    """

    spec: ModelSpec
    layout: TokenLayout
    layers: tuple[LayerSpec, ...]
    options: tuple[tuple[tuple[tuple[PatternLike | None, Tensor], ...], ...], ...]
    errors: tuple[Tensor, ...]
    alone: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]

    def density(self, picks: Picks) -> float:
        """Blocks that are kept, of those of all tuned layers."""
        kept = [
            own[pick][1].double().mean().item()
            for heads, chosen in zip(self.options, picks, strict=True)
            for own, pick in zip(heads, chosen, strict=True)
        ]
        return sum(kept) / len(kept)

    def predicted(self, picks: Picks) -> float:
        """Relative error of the target that is expected."""
        return (
            sum(
                float(error[head, pick])
                for error, chosen in zip(self.errors, picks, strict=True)
                for head, pick in enumerate(chosen)
            )
            ** 0.5
        )


@dataclass(frozen=True)
class Trial:
    """A plan that was run on the images kept back.

    asked      of the solver
    errors     of the target, one per image
    speedup    measured, where it was asked for
    """

    asked: float
    picks: Picks
    plan: SparsityPlan
    errors: tuple[float, ...]
    speedup: float | None

    @property
    def measured(self) -> float:
        """Mean error."""
        return sum(self.errors) / len(self.errors)

    @property
    def bound(self) -> float:
        """What the mean over all such images is at most, at 99 % confidence."""
        return mean_at_most(self.errors)


def make_plan(tuned: Tuned, picks: Picks) -> SparsityPlan:
    """The plan with these candidates."""
    patterns: dict[str, PatternLike] = {}
    layers = {layer.key: ("dense",) * layer.heads for layer in tuned.spec.layers}
    for layer, heads, chosen in zip(tuned.layers, tuned.options, picks, strict=True):
        names = []
        for head, (own, pick) in enumerate(zip(heads, chosen, strict=True)):
            pattern = own[pick][0]
            static = pattern is not None and type(pattern).__name__ == "Static"
            name = (
                "dense" if pattern is None else f"{layer.key}/{head}" if static else repr(pattern)
            )
            if pattern is not None:
                patterns[name] = pattern
            names.append(name)
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
    """Relative L2 error of the target for every image; `images` and `references` are this process's share."""
    with sparse(model, plan):
        outs = distributed.together(lambda: [target(model, image) for image in images])
    errors = [
        float((a - b).double().norm() / b.double().norm())
        for a, b in zip(outs, references, strict=True)
    ]
    errors = distributed.collect(errors)
    if not all(map(math.isfinite, errors)):
        raise ValueError(
            "the features of these images are not finite: check the images (NaN, infinite values) and the weights."
        )
    return errors


def layer_errors(
    model: nn.Module,
    plan: SparsityPlan,
    images: Sequence[Any],
    target: Target,
    layers: Sequence[LayerSpec],
) -> list[float]:
    """Relative L2 error of what each layer returns for the input it gets, mean over images; `images` is this process's share."""
    found: list[list[float]] = []
    with sparse(model, plan):
        for image in images:
            with errors_alone(model) as errors:
                target(model, image)
            found.append([sum(errors[layer.name]) / len(errors[layer.name]) for layer in layers])
    found = distributed.collect(found)
    return [sum(own) / len(own) for own in zip(*found, strict=True)]


def time_plan(
    model: nn.Module, plan: SparsityPlan, image: Any, target: Target, rounds: int
) -> tuple[float, float]:
    """How many times as fast the target is with this plan, and its seconds without: medians of alternating runs, of the first process."""
    with sparse(model, plan):
        if distributed.rank_and_size()[0]:
            return distributed.of_the_first((0.0, 0.0))
        times = paired(
            {"dense": lambda: _dense(model, image, target), "sparse": lambda: target(model, image)},
            rounds,
        )
        return distributed.of_the_first((1 / times["sparse"].ratio, times["dense"].median))


def _dense(model: nn.Module, image: Any, target: Target) -> Tensor:
    with torch.no_grad(), dense(model):
        return target(model, image)

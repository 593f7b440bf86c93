"""`tune`: statistics, candidates, a solver, and a check on images that none of these saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters import Observation, inspect, observe, restore_, sparsify_
from bsa_vision.errors import PlanError
from bsa_vision.features import features
from bsa_vision.latency import Latency
from bsa_vision.latency import latency as latency_here
from bsa_vision.model_spec import LayerSpec, ModelSpec
from bsa_vision.plan import PatternLike, SparsityPlan
from bsa_vision.tuning import candidates as table
from bsa_vision.tuning.solve import Choice, solve
from bsa_vision.tuning.statistics import BlockStatistics, CandidateErrors
from masks import TokenLayout

Target = Callable[[Any, Any], Tensor]
ROUNDS = 6  # of adjusting a plan until its measured error is what was asked for


@dataclass(frozen=True, eq=False)
class Tuned:
    """What the passes found, from which plans for any budget follow.

    options  [layer][head]: candidates, the first one dense (pattern None)
    errors   [layer]: (H, K) squared error of the target, as a share of its squared length, that each candidate is expected to cause
    """

    spec: ModelSpec
    layout: TokenLayout
    layers: tuple[LayerSpec, ...]
    options: tuple[tuple[tuple[tuple[PatternLike | None, Tensor], ...], ...], ...]
    errors: tuple[Tensor, ...]


def tune(
    model: nn.Module,
    images: Iterable[Any],
    *,
    sparsity: float | None = None,
    max_error: float | None = None,
    speedup: float | None = None,
    layers: Iterable[int | str] | None = None,
    candidates: Sequence[str] = table.NAMES,
    order: str = "tile",
    tile: tuple[int, int] = (8, 16),
    block_size: int = 128,
    verify: float = 1 / 3,
    target: Target = features,
    seed: int = 0,
    latency: Latency | None = None,
    on_step: Callable[[str], None] = lambda what: None,
) -> SparsityPlan:
    """A plan for `model`, chosen on some of `images` and checked on the others.

    images      what `target` takes with the model, all of one size: by default pixels (B, 3, h, w). At least two
    sparsity    fraction of the blocks of all tuned layers to skip, 0 to 1: least error among those plans; or
    max_error   relative L2 error of the target, mean over the images kept back: as sparse as it gets within it; or
    speedup     of the tuned layers' attention, as `bsa.latency` expects it on this machine: least error among those plans
    layers      indices, keys or module paths; None = all that attend to the whole image
    candidates  among "static" (best blocks of the mean map), "local_window", "axial", "strided", "special"
    verify      share of the images that is kept back
    target      (model, image) -> the features that are used; their error is what counts

    The model must have no sparse heads, and has none afterwards. What was predicted and measured is in the plan's notes. ValueError or
    PlanError for budgets that cannot be met (with what can), too few images, images of several sizes, and results that are not finite.
    """
    asked = {"sparsity": sparsity, "max_error": max_error, "speedup": speedup}
    name, wanted = _asked(asked)
    chosen, kept_back = _split(list(images), verify, seed)
    unknown = [one for one in candidates if one not in table.NAMES]
    if unknown or not candidates:
        raise ValueError(f"candidates={list(candidates)}: allowed are {', '.join(table.NAMES)}; choose among them.")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            options = dict(order=order, tile=tile, block_size=block_size)
            tuned = measure(model, chosen, layers, candidates, target, on_step, **options)
            latency = latency or (latency_here(tuned.layers[0].head_dim) if name == "speedup" else None)
            references = [target(model, image) for image in kept_back]
            plan, found = _within(tuned, model, name, wanted, kept_back, references, target, latency, on_step)
    finally:
        model.train(was_training)
    notes = {"asked": {name: wanted}, "images": {"chosen on": len(chosen), "kept back": len(kept_back), "seed": seed}}
    return replace(plan, notes={"tuned": {**notes, **found}})


def _asked(asked: dict[str, float | None]) -> tuple[str, float]:
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"tune got {', '.join(given) or 'no budget'}: exactly one of {', '.join(asked)} is needed; give e.g. sparsity=0.5."
        )
    ((name, value),) = given.items()
    fits = 0 <= value < 1 if name == "sparsity" else value > 0 if name == "max_error" else value >= 1
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits:
        allowed = {"sparsity": "a fraction from 0 to below 1", "max_error": "an error above 0", "speedup": "at least 1"}
        raise ValueError(f"{name}={value!r}: expected {allowed[name]}; give such a number.")
    return name, float(value)


def _split(images: list[Any], verify: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Those to choose on, those kept back."""
    if len(images) < 2:
        raise ValueError(
            f"{len(images)} images: at least 2 are needed, one to choose on and one kept back to check; 16 or more are better."
        )
    if not 0 < verify < 1:
        raise ValueError(
            f"verify={verify!r}: expected the share of the images to keep back, between 0 and 1; give e.g. 0.33."
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    back = min(max(1, round(verify * len(images))), len(images) - 1)
    return [images[i] for i in sorted(order[back:])], [images[i] for i in sorted(order[:back])]


# What candidates would cost


@torch.no_grad()
def measure(
    model: nn.Module,
    images: Sequence[Any],
    layers: Iterable[int | str] | None,
    names: Sequence[str],
    target: Target,
    on_step: Callable[[str], None] = lambda what: None,
    **layout_options: Any,
) -> Tuned:
    """Both passes over `images`, and how much the target feels each layer."""
    spec = inspect(model)
    tuned_layers = _layers(spec, layers)
    keys = {layer.key: index for index, layer in enumerate(tuned_layers)}
    layouts: list[TokenLayout] = []

    def layout_of(seen: Observation) -> TokenLayout:
        options = dict(start=spec.start, end=spec.end, **layout_options)
        layout = TokenLayout(seen.grid, **options)
        layouts[:] = layouts or [layout]
        if layout != layouts[0] or seen.k.shape[2] != layout.num_tokens:
            raise ValueError(
                f"images of {layouts[0].grid} and {layout.grid} patches: one plan is tuned for one size; resize or crop the images."
            )
        return layout

    statistics: dict[int, BlockStatistics] = {}

    def first(seen: Observation) -> None:
        if seen.layer.key in keys:
            layout = layout_of(seen)
            own = statistics.setdefault(keys[seen.layer.key], BlockStatistics.empty(seen.layer.heads, layout))
            own.add(seen, layout)

    _pass(model, images, target, first, on_step, "where attention goes")
    (layout,) = layouts
    options = [_options(names, statistics[index], layout) for index in range(len(tuned_layers))]
    masks = [torch.stack([torch.stack([mask for _, mask in head]) for head in layer]) for layer in options]
    found = [CandidateErrors.empty(*mask.shape[:2]) for mask in masks]

    def second(seen: Observation) -> None:
        if seen.layer.key in keys:
            index = keys[seen.layer.key]
            found[index].add(seen, layout, masks[index].to(seen.q.device))

    _pass(model, images, target, second, on_step, "what candidates cost")
    if not all(bool(one.error.isfinite().all()) and math.isfinite(one.total) for one in found):
        raise ValueError(
            "attention of these images is not finite: check the images (NaN, infinite values) and the model's weights."
        )
    relative = [one.error / max(one.total, 1e-300) for one in found]
    tuned = Tuned(spec, layout, tuned_layers, tuple(options), tuple(relative))
    weights = _layer_weights(model, tuned, images, target, on_step)
    return replace(tuned, errors=tuple(weight * error for weight, error in zip(weights, relative, strict=True)))


def _layers(spec: ModelSpec, layers: Iterable[int | str] | None) -> tuple[LayerSpec, ...]:
    able = [layer for layer in spec.layers if not layer.window and not layer.frames]
    if layers is None:
        if not able:
            raise PlanError("no layer of this model attends to the whole image: there is nothing to tune.")
        return tuple(able)
    wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
    found = [
        next((layer for layer in able if layer.index == one), None) if isinstance(one, int) else spec.find(one)
        for one in wanted
    ]
    if not wanted or any(layer not in able for layer in found):
        raise PlanError(
            f"layers={wanted}: allowed are those that attend to the whole image, {', '.join(layer.name for layer in able)}; choose among them."
        )
    return tuple(layer for layer in found if layer is not None)


def _pass(
    model: nn.Module,
    images: Sequence[Any],
    target: Target,
    see: Callable[[Observation], None],
    on_step: Callable[[str], None],
    what: str,
) -> None:
    with observe(model, see):
        for image in images:
            target(model, image)
            on_step(what)


def _options(names: Sequence[str], statistics: BlockStatistics, layout: TokenLayout) -> Any:
    """[head]: (pattern, mask) of every candidate, dense first; as many for each head."""
    dense = (None, torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool, device="cpu"))
    shared = table.geometric(names, layout)
    own = table.static(statistics, layout) if "static" in names else [[] for _ in statistics.mass]
    return tuple((dense, *shared, *head) for head in own)


def _layer_weights(
    model: nn.Module, tuned: Tuned, images: Sequence[Any], target: Target, on_step: Callable[[str], None]
) -> list[float]:
    """Per layer: squared error of the target over that of the layer's output, with half of the layer's blocks skipped."""
    some = images[: max(1, 4 * len(images) // (len(tuned.layers) + 1))]
    references = [target(model, image) for image in some]
    weights = []
    for index in range(len(tuned.layers)):
        picks = [_nearest_half(head) for head in tuned.options[index]]
        expected = sum(float(tuned.errors[index][head, pick]) for head, pick in enumerate(picks))
        plan = make_plan(tuned, [picks if i == index else [0] * len(picks) for i in range(len(tuned.layers))])
        errors = _errors(model, plan, some, references, target)
        weights.append(sum(error**2 for error in errors) / len(errors) / max(expected, 1e-300))
        on_step("how much each layer matters")
    return weights


def _nearest_half(head: Sequence[tuple[Any, Tensor]]) -> int:
    """The candidate that skips about half of the blocks, best blocks before geometry."""
    return min(range(len(head)), key=lambda i: (abs(head[i][1].float().mean().item() - 0.5), -i))


def _errors(
    model: nn.Module, plan: SparsityPlan, images: Sequence[Any], references: Sequence[Tensor], target: Target
) -> list[float]:
    """Relative L2 error of the target, image by image."""
    sparsify_(model, plan)
    try:
        outs = [target(model, image) for image in images]
    finally:
        restore_(model)
    errors = [float((a - b).double().norm() / b.double().norm()) for a, b in zip(outs, references, strict=True)]
    if not all(map(math.isfinite, errors)):
        raise ValueError(
            "the features of these images are not finite: check the images (NaN, infinite values) and the weights."
        )
    return errors


# Plans


def make_plan(tuned: Tuned, picks: Sequence[Sequence[int]]) -> SparsityPlan:
    """The plan with these candidates, [layer][head]."""
    patterns: dict[str, PatternLike] = {}
    layers = {layer.key: ("dense",) * layer.heads for layer in tuned.spec.layers}
    for layer, heads, chosen in zip(tuned.layers, tuned.options, picks, strict=True):
        names = []
        for head, (own, pick) in enumerate(zip(heads, chosen, strict=True)):
            pattern = own[pick][0]
            static = pattern is not None and type(pattern).__name__ == "Static"
            name = "dense" if pattern is None else f"{layer.key}/{head}" if static else repr(pattern)
            if pattern is not None:
                patterns[name] = pattern
            names.append(name)
        layers[layer.key] = tuple(names)
    layout = tuned.layout
    return SparsityPlan(tuned.spec.fingerprint, patterns, layers, layout.order, layout.tile, layout.block_size)


def solve_for(tuned: Tuned, name: str, wanted: float, latency: Latency | None = None) -> list[list[int]]:
    """[layer][head] candidates: least error at that sparsity or speedup, or least density within that error."""
    choices, costs = [], []
    for errors, heads in zip(tuned.errors, tuned.options, strict=True):
        for head, own in enumerate(heads):
            cost = [_cost(mask, index, tuned.layout, latency) for index, (_, mask) in enumerate(own)]
            choices.append(Choice(errors[head].tolist(), cost))
            costs.append(cost[0])
    if name == "max_error":
        found = solve(choices, max_error=wanted**2)
    else:
        share = 1 - wanted if name == "sparsity" else 1 / wanted
        try:
            found = solve(choices, budget=share * sum(costs))
        except PlanError:
            least = sum(min(choice.costs) for choice in choices) / sum(costs)
            can = 1 - least if name == "sparsity" else 1 / least
            raise PlanError(
                f"{name}={wanted:g} cannot be met with these candidates: at most {can:.3g} can; ask for less, or allow more candidates."
            ) from None
    each = iter(found)
    return [[next(each) for _ in heads] for heads in tuned.options]


def _cost(mask: Tensor, index: int, layout: TokenLayout, latency: Latency | None) -> float:
    """Blocks, or expected seconds of a head; the first candidate is dense."""
    if latency is None:
        return float(mask.sum())
    rows = layout.num_blocks if index else 0
    dense = latency.sparse_pair if latency.dense_in_loop else latency.dense_pair
    pairs = float(mask.float().mean()) * layout.num_tokens**2
    return latency.sparse_row * rows + (latency.sparse_pair if index else dense) * pairs


def _within(
    tuned: Tuned,
    model: nn.Module,
    name: str,
    wanted: float,
    images: Sequence[Any],
    references: Sequence[Tensor],
    target: Target,
    latency: Latency | None,
    on_step: Callable[[str], None],
) -> tuple[SparsityPlan, dict[str, Any]]:
    """The plan, adjusted until what was asked for holds where it is measured, and what was found on the way."""
    tried: list[dict[str, Any]] = []

    def attempt(asked: float) -> tuple[SparsityPlan, float]:
        picks = solve_for(tuned, name, asked, latency)
        plan = make_plan(tuned, picks)
        errors = _errors(model, plan, images, references, target)
        predicted = sum(
            float(error[head, pick])
            for error, chosen in zip(tuned.errors, picks, strict=True)
            for head, pick in enumerate(chosen)
        )
        density = _density(tuned, picks)
        mean = sum(errors) / len(errors)
        tried.append(
            {"asked": asked, "sparsity": 1 - density, "predicted": predicted**0.5, "measured": mean, "errors": errors}
        )
        on_step("checking")
        return plan, mean

    plan, mean = attempt(wanted)
    if name == "max_error":
        plan, mean = _adjust(attempt, wanted, plan, mean)
    best = next(one for one in reversed(tried) if one["measured"] == mean)
    over = None if name != "max_error" else sum(error > wanted for error in best["errors"])
    return plan, {
        **best,
        "images above": over,
        "tried": [{k: v for k, v in one.items() if k != "errors"} for one in tried],
    }


def _adjust(
    attempt: Callable[[float], tuple[SparsityPlan, float]], wanted: float, plan: SparsityPlan, mean: float
) -> tuple[SparsityPlan, float]:
    """Bisect on the predicted error until the measured one is just within what is wanted."""
    low, high = 0.0, math.inf
    asked, best = wanted, (plan, mean) if mean <= wanted else None
    for _ in range(ROUNDS):
        low, high = (asked, high) if mean <= wanted else (low, asked)
        if best is not None and best[1] > 0.95 * wanted:
            break
        # Error is nearly proportional to what is asked for; between known ends, take the middle of their logarithms.
        step = asked * wanted / max(mean, 1e-12)
        asked = step if low < step < high else math.sqrt(max(low, 1e-3 * wanted) * min(high, 1e3 * wanted))
        plan, mean = attempt(asked)
        if mean <= wanted and (best is None or asked > low):
            best = (plan, mean)
    if best is None:
        raise PlanError(f"max_error={wanted:g} cannot be met: the least that was measured is {mean:.3g}; ask for more.")
    return best


def _density(tuned: Tuned, picks: Sequence[Sequence[int]]) -> float:
    kept = [
        own[pick][1].double().mean().item()
        for heads, chosen in zip(tuned.options, picks, strict=True)
        for own, pick in zip(heads, chosen, strict=True)
    ]
    return sum(kept) / len(kept)

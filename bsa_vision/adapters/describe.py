"""What `describe` says of a model: data first, a table second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bsa_vision.adapters.swap.sparse_layer import SparseLayer
from bsa_vision.adapters.unsupported import LeftDense
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import choose, reasons
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.measure.latency import Latency
from bsa_vision.plans import text_table
from bsa_vision.plans.flops import ModelCost


@dataclass(frozen=True)
class LayerReport:
    """One attention layer at one grid.

    keys       that its queries attend to: as many as tokens, or what is remembered
    patterns   one name per head
    sparsity   realised, all heads together, 0 to 1; head_sparsity of each
    expected   time of its attention over that of dense attention, as `latency` has it; 1 where it runs dense
    break_even tokens from which this density is faster than dense, None = never; 0 where it runs dense
    better_dense   the sparse heads that gain nothing on this machine
    backend    what a forward on this device and dtype would take; "original" when the layer runs untouched
    why_not    backend preferred to that one -> why it cannot run here
    share      of the encoder's FLOPs that are this layer's products, 0 to 1: what full sparsity would save
    fallbacks  reason -> calls that the original attention served so far
    """

    name: str
    tokens: int
    keys: int
    heads: int
    head_dim: int
    patterns: tuple[str, ...]
    sparsity: float
    head_sparsity: tuple[float, ...]
    expected: float
    break_even: int | None
    better_dense: tuple[int, ...]
    backend: str
    why_not: dict[str, str]
    share: float
    fallbacks: dict[str, int]

    @property
    def pattern_summary(self) -> str:
        counts = {name: self.patterns.count(name) for name in dict.fromkeys(self.patterns)}
        return ", ".join(
            name if count == self.heads else f"{count} x {name}" for name, count in counts.items()
        )


@dataclass(frozen=True)
class ModelReport:
    """All attention layers of a swapped model; `str()` gives a table.

    machine   what `expected`, `break_even` and `better_dense` of the layers hold for
    cost      FLOPs of the encoder at this grid, and its ceiling
    gain      how many times fewer FLOPs the encoder needs with the plan's sparsity
    left      attention of the model that is not swapped, and why
    labels    what to know of the plan's patterns at this grid
    """

    family: str
    grid: tuple[int, int]
    order: str
    layers: tuple[LayerReport, ...]
    machine: str
    cost: ModelCost
    left: tuple[LeftDense, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Realised sparsity over all layers and heads, dense ones included, 0 to 1."""
        return sum(layer.sparsity for layer in self.layers) / len(self.layers)

    @property
    def gain(self) -> float:
        return self.cost.gain(
            {x.key: layer.sparsity for x, layer in zip(self.cost.layers, self.layers, strict=True)}
        )

    def __str__(self) -> str:
        titles = (
            "layer",
            "tokens",
            "heads x dim",
            "pattern per head",
            "sparsity",
            "of FLOPs",
            "backend",
            "of dense time",
        )
        rows = [(*titles, "original instead")]
        for layer in self.layers:
            fallbacks = "; ".join(
                f"{count} x {reason}" for reason, count in layer.fallbacks.items()
            )
            size = f"{layer.heads} x {layer.head_dim}"
            pattern, sparsity, share = (
                layer.pattern_summary,
                f"{layer.sparsity:.1%}",
                f"{layer.share:.1%}",
            )
            numbers = (sparsity, share, layer.backend, f"{layer.expected:.2f}")
            tokens = (
                f"{layer.tokens}"
                if layer.keys == layer.tokens
                else f"{layer.tokens} to {layer.keys}"
            )
            rows.append((layer.name, tokens, size, pattern, *numbers, fallbacks))
        height, width = self.grid
        summary = f"{self.family}, {height} x {width} patches, order {self.order}: {self.sparsity:.1%} of all blocks are skipped"
        why_not = {
            (name, reason) for layer in self.layers for name, reason in layer.why_not.items()
        }
        notes = [f"not {name}: {reason}" for name, reason in sorted(why_not)]
        return "\n".join(
            [
                summary,
                *text_table.lines(rows),
                *self._honesty(),
                *self.labels,
                *map(str, self.left),
                *notes,
            ]
        )

    def _honesty(self) -> list[str]:
        """What is not worth doing, and from where on it is."""
        sparse = [layer for layer in self.layers if layer.sparsity]
        plan = f"; this plan's sparsity gains {self.gain:.2f}x at most" if sparse else ""
        lines = [self.cost.sentence + plan]
        lines += [f"of dense time: attention alone, expected on {self.machine}"] if sparse else []
        if any(layer.break_even is None for layer in sparse):
            lines.append(
                "sparsity pays at no number of tokens in layers "
                + _names(sparse, lambda x: x.break_even is None)
            )
        known = [layer.break_even for layer in sparse if layer.break_even is not None]
        if known:
            lines.append(f"sparsity pays from {max(known)} tokens on, one image per call")
        for layer in sparse:
            if layer.better_dense:
                heads = ", ".join(map(str, layer.better_dense))
                lines.append(
                    f"{layer.name}: heads {heads} gain nothing here and are better dense; bsa.prune(plan, spec) makes them so"
                )
        return lines


def _names(layers: list[LayerReport], which: Callable[[LayerReport], bool]) -> str:
    return ", ".join(layer.name for layer in layers if which(layer))


def probe_problem(layer: SparseLayer, masks: HeadMasks, like: Tensor) -> Problem:
    """A problem of this layer's kind and size for choosing a backend: backends look at metadata only."""
    one = like.new_empty(1)

    def probe(tokens: int, width: int) -> Tensor:
        return one.expand(1, layer.spec.heads, tokens, width)

    tokens, keys = (1 if x is None else x.num_tokens for x in (masks.layout, masks.kv_layout))
    q, k, dim = (
        probe(tokens, layer.spec.head_dim),
        probe(keys, layer.spec.head_dim),
        layer.spec.head_dim,
    )
    rel_pos = None
    if layer.spec.rel_pos:
        sides = (1, 1) if masks.kv_layout is None else masks.kv_layout.grid
        rel_pos = RelPos(probe(tokens, sides[0]), probe(tokens, sides[1]))
    return Problem(q, k, k, masks, scale=dim**-0.5, rel_pos=rel_pos)


def report_layer(
    layer: SparseLayer, grid: tuple[int, int], like: Tensor, latency: Latency, cost: ModelCost
) -> LayerReport:
    """The report of one layer at `grid`, for tensors of the device and dtype of `like`, one image per call."""
    spec, plan = layer.spec, layer.encoder.plan
    grid = layer.grid_of(grid)
    masks = layer.masks.without_prompts(grid)
    layout = plan.layout(layer.encoder.spec, grid)
    tokens, keys = layout.num_tokens, (masks.kv_layout or layout).num_tokens
    sparse = masks.head_sparsity if masks.num_blocks is not None else (0.0,) * spec.heads
    problem = probe_problem(layer, masks, like)
    backend = "original" if layer.untouched else choose(problem, layer.encoder.backend)
    why_not = {}
    if backend != "original" and not masks.all_dense:
        for name, reason in reasons(problem).items():
            if name == backend:
                break
            if reason is not None:
                why_not[name] = reason
    sparsity, is_sparse = sum(sparse) / len(sparse), not masks.all_dense
    return LayerReport(
        name=spec.name,
        tokens=tokens,
        keys=keys,
        heads=spec.heads,
        head_dim=spec.head_dim,
        patterns=plan.layers[spec.key],
        sparsity=sparsity,
        head_sparsity=tuple(sparse),
        expected=latency.of_masks(masks, tokens, keys=keys)
        / latency.dense(spec.heads, tokens, keys=keys),
        break_even=latency.break_even(
            spec.heads, 1 - sparsity, masks.block_size, keys=keys / tokens
        )
        if is_sparse
        else 0,
        better_dense=latency.better_dense(masks, tokens, keys=keys),
        backend=backend,
        why_not=why_not,
        share=cost.share([spec.key]),
        fallbacks=dict(layer.fallbacks),
    )

"""Describe the attention layers of a model: `describe` returns reports that print as a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from bsa_vision.adapters.find_encoder import at_size, find_encoder, is_supported, sparse_layers
from bsa_vision.adapters.swap.encoder_state import EncoderState
from bsa_vision.adapters.swap.sparse_layer import SparseLayer, swapped_in
from bsa_vision.adapters.swap.values import like_of
from bsa_vision.adapters.unsupported import LeftDense, left_dense
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import choose, reasons
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.masks import Pattern
from bsa_vision.measure.latency import Latency
from bsa_vision.measure.latency import latency as measured_latency
from bsa_vision.plans import text_table
from bsa_vision.plans.flops import ModelCost, cost
from bsa_vision.plans.model_spec import ModelSpec
from bsa_vision.plans.plan import SparsityPlan


@dataclass(frozen=True)
class LayerReport:
    """One attention layer at one grid.

    keys           number of keys its queries attend to: its tokens, or the remembered ones
    patterns       one name per head
    sparsity       realised, mean over the heads, 0 to 1
    head_sparsity  realised, of each head, 0 to 1
    expected       attention time relative to dense, predicted by `latency`; 1 if the layer is dense
    break_even     tokens from which this density is faster than dense; None = never, 0 = dense
    better_dense   the sparse heads that gain nothing on this machine
    backend        backend of a forward on this device and dtype; "original" if the layer is not
                   changed
    why_not        preferred backend -> why it cannot run
    share          fraction of the encoder's FLOPs in this layer's attention products, 0 to 1: the
                   most that sparsity could save
    fallbacks      reason -> number of calls that ran the original attention so far
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
        """The patterns with their number of heads, such as "1 x dense, 3 x axial"."""
        counts = {name: self.patterns.count(name) for name in dict.fromkeys(self.patterns)}
        return ", ".join(
            name if count == self.heads else f"{count} x {name}" for name, count in counts.items()
        )


@dataclass(frozen=True)
class ModelReport:
    """All attention layers of a swapped model; `str()` gives a table.

    machine  the machine for which `expected`, `break_even` and `better_dense` hold
    cost     FLOPs of the encoder at this grid
    left     attention modules that are not swapped, and why
    labels   remarks on the plan's patterns at this grid
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
        """FLOPs of the dense encoder divided by its FLOPs with the plan's sparsity."""
        pairs = zip(self.cost.layers, self.layers, strict=True)
        return self.cost.gain({layer_cost.key: layer.sparsity for layer_cost, layer in pairs})

    def __str__(self) -> str:
        titles = (
            "layer",
            "tokens",
            "heads x dim",
            "pattern per head",
            "sparsity",
            "FLOPs share",
            "backend",
            "expected time / dense",
            "fallbacks",
        )
        rows = [titles, *map(_table_row, self.layers)]
        height, width = self.grid
        summary = (
            f"{self.family}, {height} x {width} patches, order {self.order}: "
            f"{self.sparsity:.1%} of all blocks are skipped"
        )
        why_not = {item for layer in self.layers for item in layer.why_not.items()}
        lines = [
            summary,
            *text_table.lines(rows),
            *self._cost_lines(),
            *self.labels,
            *map(str, self.left),
            *(f"not {name}: {reason}" for name, reason in sorted(why_not)),
        ]
        return "\n".join(lines)

    def _cost_lines(self) -> list[str]:
        """Return what the plan can gain, and where sparsity does not pay off."""
        sparse = [layer for layer in self.layers if layer.sparsity]
        if not sparse:
            return [self.cost.sentence]
        lines = [
            f"{self.cost.sentence}; this plan gains at most {self.gain:.2f}x",
            f"expected time: attention only, on {self.machine}",
        ]
        never = [layer.name for layer in sparse if layer.break_even is None]
        if never:
            lines.append(
                "sparse attention is never faster than dense on this machine in layers "
                + ", ".join(never)
            )
        known = [layer.break_even for layer in sparse if layer.break_even is not None]
        if known:
            lines.append(f"sparse attention is faster from {max(known)} tokens, one image per call")
        for layer in sparse:
            if layer.better_dense:
                heads = ", ".join(map(str, layer.better_dense))
                lines.append(
                    f"{layer.name}: heads {heads} gain nothing on this machine; "
                    "bsa.prune(plan, spec) makes them dense"
                )
        return lines


def _table_row(layer: LayerReport) -> tuple[str, ...]:
    tokens = str(layer.tokens)
    if layer.keys != layer.tokens:
        tokens = f"{layer.tokens} to {layer.keys}"
    return (
        layer.name,
        tokens,
        f"{layer.heads} x {layer.head_dim}",
        layer.pattern_summary,
        f"{layer.sparsity:.1%}",
        f"{layer.share:.1%}",
        layer.backend,
        f"{layer.expected:.2f}",
        "; ".join(f"{count} x {reason}" for reason, count in layer.fallbacks.items()),
    )


def probe_problem(layer: SparseLayer, masks: HeadMasks, like: Tensor) -> Problem:
    """Return a problem of this layer's kind and size for choosing a backend.

    Its tensors are views of one element: backends look at metadata only.
    """
    element = like.new_empty(1)

    def probe(tokens: int, width: int) -> Tensor:
        return element.expand(1, layer.spec.heads, tokens, width)

    tokens, keys = (1 if x is None else x.num_tokens for x in (masks.layout, masks.kv_layout))
    dim = layer.spec.head_dim
    q, k = probe(tokens, dim), probe(keys, dim)
    rel_pos = None
    if layer.spec.rel_pos:
        sides = (1, 1) if masks.kv_layout is None else masks.kv_layout.grid
        rel_pos = RelPos(probe(tokens, sides[0]), probe(tokens, sides[1]))
    return Problem(q, k, k, masks, scale=dim**-0.5, rel_pos=rel_pos)


def report_layer(
    layer: SparseLayer, grid: tuple[int, int], like: Tensor, latency: Latency, cost: ModelCost
) -> LayerReport:
    """Report on one layer at `grid`, for one image per call on the device and dtype of `like`."""
    spec, plan = layer.spec, layer.encoder.plan
    grid = layer.grid_of(grid)
    masks = layer.masks.without_prompts(grid)
    layout = plan.layout(layer.encoder.spec, grid)
    tokens, keys = layout.num_tokens, (masks.kv_layout or layout).num_tokens
    sparsity = masks.head_sparsity if masks.num_blocks is not None else (0.0,) * spec.heads
    mean_sparsity = sum(sparsity) / len(sparsity)
    break_even = (
        0
        if masks.all_dense
        else latency.break_even(spec.heads, 1 - mean_sparsity, masks.block_size, keys=keys / tokens)
    )
    dense_seconds = latency.dense(spec.heads, tokens, keys=keys)
    problem = probe_problem(layer, masks, like)
    backend = "original" if layer.untouched else choose(problem, layer.encoder.backend)
    why_not = {}
    if backend != "original" and not masks.all_dense:
        for name, reason in reasons(problem).items():
            if name == backend:
                break
            if reason is not None:
                why_not[name] = reason
    return LayerReport(
        name=spec.name,
        tokens=tokens,
        keys=keys,
        heads=spec.heads,
        head_dim=spec.head_dim,
        patterns=plan.layers[spec.key],
        sparsity=mean_sparsity,
        head_sparsity=tuple(sparsity),
        expected=latency.of_masks(masks, tokens, keys=keys) / dense_seconds,
        break_even=break_even,
        better_dense=latency.better_dense(masks, tokens, keys=keys),
        backend=backend,
        why_not=why_not,
        share=cost.share([spec.key]),
        fallbacks=dict(layer.fallbacks),
    )


def describe(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    latency: Latency | None = None,
) -> ModelReport:
    """Report on each attention layer of a model, on its device and dtype; print it for a table.

    For a model without sparse heads, the report shows what sparsity could gain.

    image_size  pixels, an int or (height, width); None = size of the last input, or the model's
                default before the first one
    latency     attention cost on this machine; None = `bsa.latency(...)`, which measures it once
                and takes a second or two
    """
    pairs = list(swapped_in(model).items()) or _dense_layers(model)
    layers = [layer for _, layer in pairs]
    encoder = layers[0].encoder
    if any(layer.encoder is not encoder for layer in layers):
        raise ValueError(
            f"{type(model).__name__} holds several encoders with sparse heads: pass one of them."
        )
    grid = (
        encoder.grid
        if image_size is None and encoder.grid != (0, 0)
        else at_size(encoder.spec, image_size).grid
    )
    like = like_of(pairs[0][0], model)
    latency = latency or measured_latency(encoder.spec.layers[0].head_dim, like.dtype, like.device)
    # Layers may have been removed since sparsify_.
    spec = replace(encoder.spec, grid=grid, layers=tuple(layer.spec for layer in layers))
    model_cost = cost(spec, element_size=like.element_size())
    reports = tuple(report_layer(layer, grid, like, latency, model_cost) for layer in layers)
    used = {name for names in encoder.plan.layers.values() for name in names if name != "dense"}
    labels = tuple(
        f"{name}: {label}" for name in sorted(used) for label in _labels(encoder.plan, name, spec)
    )
    left = left_dense(model, [module for module, _ in pairs], is_supported)
    return ModelReport(
        spec.family, grid, encoder.plan.order, reports, latency.what, model_cost, left, labels
    )


def _dense_layers(model: nn.Module) -> list[tuple[nn.Module, SparseLayer]]:
    """Return the layers that a dense plan would give to `model`, without changing it."""
    adapter, found = find_encoder(model)
    encoder = EncoderState(
        found.spec, SparsityPlan.uniform(found.spec, "dense"), "auto", "fallback", found.grid_of
    )
    return sparse_layers(encoder, adapter, found)


def _labels(plan: SparsityPlan, name: str, spec: ModelSpec) -> list[str]:
    pattern = plan.patterns[name]
    return pattern.labels(plan.layout(spec)) if isinstance(pattern, Pattern) else []

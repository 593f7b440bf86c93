"""What `describe` says of a model: data first, a table second."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bsa_vision.adapters.layer import Layer
from bsa_vision.backends import Problem, choose, reasons


@dataclass(frozen=True)
class LayerReport:
    """One attention layer at one grid.

    patterns   one name per head
    sparsity   realised, all heads together, 0 to 1; head_sparsity of each
    backend    what a forward on this device and dtype would take; "original" when the layer runs untouched
    why_not    backend preferred to that one -> why it cannot run here
    fallbacks  reason -> calls that the original attention served so far
    """

    name: str
    tokens: int
    heads: int
    head_dim: int
    patterns: tuple[str, ...]
    sparsity: float
    head_sparsity: tuple[float, ...]
    backend: str
    why_not: dict[str, str]
    fallbacks: dict[str, int]

    @property
    def pattern_summary(self) -> str:
        counts = {name: self.patterns.count(name) for name in dict.fromkeys(self.patterns)}
        return ", ".join(name if count == self.heads else f"{count} x {name}" for name, count in counts.items())


@dataclass(frozen=True)
class ModelReport:
    """All attention layers of a swapped model; `str()` gives a table."""

    family: str
    grid: tuple[int, int]
    order: str
    layers: tuple[LayerReport, ...]

    @property
    def sparsity(self) -> float:
        """Realised sparsity over all layers and heads, dense ones included, 0 to 1."""
        return sum(layer.sparsity for layer in self.layers) / len(self.layers)

    def __str__(self) -> str:
        rows = [("layer", "tokens", "heads x dim", "pattern per head", "sparsity", "backend", "original instead")]
        for layer in self.layers:
            fallbacks = "; ".join(f"{count} x {reason}" for reason, count in layer.fallbacks.items())
            size = f"{layer.heads} x {layer.head_dim}"
            pattern, sparsity = layer.pattern_summary, f"{layer.sparsity:.1%}"
            rows.append((layer.name, str(layer.tokens), size, pattern, sparsity, layer.backend, fallbacks))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        height, width = self.grid
        summary = f"{self.family}, {height} x {width} patches, order {self.order}: {self.sparsity:.1%} of all blocks are skipped"
        why_not = {(name, reason) for layer in self.layers for name, reason in layer.why_not.items()}
        notes = [f"not {name}: {reason}" for name, reason in sorted(why_not)]
        return "\n".join([summary, *lines, *notes])


def report_layer(layer: Layer, grid: tuple[int, int], like: Tensor) -> LayerReport:
    """The report of one layer at `grid`, for tensors of the device and dtype of `like`."""
    spec, plan = layer.spec, layer.tower.plan
    masks = layer.masks.masks_for(grid)
    tokens = plan.layout(layer.tower.spec, grid).num_tokens
    sparse = masks.head_sparsity if masks.num_blocks is not None else (0.0,) * spec.heads
    probe = like.detach().new_empty(1, spec.heads, 1, spec.head_dim)  # backends look at metadata only
    problem = Problem(probe, probe, probe, masks, scale=1.0)
    backend = "original" if layer.untouched else choose(problem, layer.tower.backend)
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
        heads=spec.heads,
        head_dim=spec.head_dim,
        patterns=plan.layers[spec.key],
        sparsity=sum(sparse) / len(sparse),
        head_sparsity=tuple(sparse),
        backend=backend,
        why_not=why_not,
        fallbacks=dict(layer.fallbacks),
    )

"""The candidates of a head: patterns from nearly dense to nearly empty.

Blocks with special tokens are always kept, blocks see themselves, and every row keeps at least two
blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.plans.pattern_spec import PatternLike
from bsa_vision.plans.static_mask import Static
from bsa_vision.tuning.statistics import BlockStatistics

GEOMETRIC: dict[str, tuple[Pattern, ...]] = {
    "local_window": tuple(
        Pattern("local_window", radius=radius) for radius in (1, 2, 3, 4, 6, 8, 12, 16, 24)
    ),
    "axial": tuple(Pattern("axial", width=width) for width in (0, 2, 4)),
    "strided": tuple(
        Pattern("local_window", radius=1) | Pattern("strided", stride=stride)
        for stride in (2, 4, 8)
    ),
    "special": (Pattern("special") | Pattern("local_window", radius=0),),
}
# Densities of `static`, as shares of the whole map, special blocks included.
DENSITIES = (0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75)
NAMES = ("static", *GEOMETRIC)
COMPARED = 64  # blocks of each row among which the best are chosen together


def geometric(names: Sequence[str], layout: TokenLayout) -> list[tuple[PatternLike, Tensor]]:
    """Return the geometric patterns of these names, each with its (R, C) mask.

    Patterns that skip nothing, keep fewer than two blocks of a row, or repeat the mask of an
    earlier one are left out.
    """
    found: list[tuple[PatternLike, Tensor]] = []
    for name in names:
        for pattern in GEOMETRIC.get(name, ()):
            mask = pattern(layout)
            new = not any(torch.equal(mask, other) for _, other in found)
            if new and not mask.all() and bool((mask.sum(-1) >= min(2, layout.num_blocks)).all()):
                found.append((pattern, mask))
    return found


def compared(statistics: BlockStatistics, layout: TokenLayout) -> Tensor:
    """Return (H, R, K), the blocks of each row that `order_of_dropping` compares with each other.

    All blocks, or the `COMPARED` blocks of largest `drop`, special blocks first.
    """
    blocks = layout.num_blocks
    if blocks <= COMPARED:
        return torch.arange(blocks, device="cpu").expand(*statistics.drop.shape[:2], blocks)
    return _forced(statistics, layout).topk(COMPARED).indices


def static(dropping: Tensor, layout: TokenLayout) -> list[list[tuple[PatternLike, Tensor]]]:
    """Return for each head the best blocks at each of `DENSITIES`.

    They are the blocks that `dropping` (H, R, C), made by `order_of_dropping`, drops last.
    """
    maps = [[_highest(head, density) for density in DENSITIES] for head in dropping]
    return [[(Static(mask, layout), mask) for mask in head] for head in maps]


def order_of_dropping(statistics: BlockStatistics, layout: TokenLayout, among: Tensor) -> Tensor:
    """Return (H, R, C) float64, the order in which blocks are dropped; infinite = never dropped.

    among  (H, R, K), the blocks of each row that `statistics.gram` is about

    Each row drops its blocks one by one. The next block is the one whose loss increases the squared
    change of the output by all blocks dropped so far the least. That change is y^T G y / m^2, with
    y the blocks kept, G their products and m the mass they keep. (All blocks together change
    nothing, so those kept change as much as those dropped.) Blocks that are not in `among` are
    dropped first, ordered by `drop`. Rows share the budget of the head by the cost of their next
    block.
    """
    score = _forced(statistics, layout)
    rest = torch.ones_like(score, dtype=torch.bool).scatter_(-1, among, False) & score.isfinite()
    mass = _shares(statistics).gather(-1, among)
    costs, steps = _drop_blocks(statistics.gram, mass, score.gather(-1, among).isfinite())
    early = _ranks(score.masked_fill(~rest, torch.inf), score) - score.numel()  # before all others
    order = torch.where(rest, early, score).scatter(-1, among, _ranks(costs, steps))
    return order.masked_fill(score.isinf(), torch.inf)


def _forced(statistics: BlockStatistics, layout: TokenLayout) -> Tensor:
    """Return `drop`, but infinite for special blocks and the best two of each row."""
    score = statistics.drop.masked_fill(Pattern("special")(layout), torch.inf)
    return score.scatter(-1, score.topk(min(2, layout.num_blocks)).indices, torch.inf)


def _shares(statistics: BlockStatistics) -> Tensor:
    """Return the mean attention (H, R, C); each row sums to 1."""
    return statistics.mass / statistics.mass.sum(-1, keepdim=True).clamp(min=1e-300)


def _drop_blocks(gram: Tensor, mass: Tensor, droppable: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the blocks of all rows one by one; return their costs and their steps, (H, R, K) each.

    gram       (H, R, K, K) products of the changes by two blocks
    mass       (H, R, K) attention that the blocks get
    droppable  (H, R, K) bool; costs and steps of other blocks are infinite

    The cost of a block is at least that of the blocks dropped before it in its row, so rows are
    compared by the cost of everything that must be dropped first.
    """
    kept, products = torch.ones_like(mass), gram.sum(-1)  # products with all blocks kept
    squared, share, diagonal = products.sum(-1), mass.sum(-1), gram.diagonal(dim1=-2, dim2=-1)
    costs, steps = torch.full_like(mass, torch.inf), torch.full_like(mass, torch.inf)
    highest = torch.zeros_like(share)
    for step in range(mass.shape[-1]):
        left = (share[..., None] - mass).clamp(min=1e-6)
        after = (squared[..., None] - 2 * products + diagonal).clamp(min=0) / left.square()
        after = after.masked_fill(~droppable | (kept == 0), torch.inf)
        least, best = after.min(-1, keepdim=True)
        any_left = least.isfinite()  # (H, R, 1)
        if not any_left.any():
            break
        highest = torch.maximum(highest, least[..., 0] - squared / share.clamp(min=1e-6).square())
        dropped = torch.zeros_like(kept).scatter_(-1, best, 1.0) * any_left
        costs = torch.where(dropped > 0, highest[..., None], costs)
        steps = torch.where(dropped > 0, float(step), steps)
        squared = squared + (dropped * (diagonal - 2 * products)).sum(-1)
        products = products - (gram * dropped[..., None]).sum(-2)
        share, kept = share - (dropped * mass).sum(-1), kept - dropped
    return costs, steps


def _ranks(values: Tensor, ties: Tensor) -> Tensor:
    """Return the rank of each value (H, R, K) in its head, 0 = lowest; `ties` orders ties."""
    by_tie = ties.flatten(1).argsort(dim=-1, stable=True)
    order = by_tie.gather(-1, values.flatten(1).gather(-1, by_tie).argsort(dim=-1, stable=True))
    ranks = torch.arange(order.shape[-1], dtype=torch.float64, device="cpu").expand_as(order)
    return torch.empty_like(ranks).scatter_(-1, order, ranks).view_as(values)


def _highest(score: Tensor, density: float) -> Tensor:
    """Return a mask (R, C) of the blocks with the highest scores, `density` of them.

    It has more blocks if more of them have an infinite score.
    """
    wanted = max(round(density * score.numel()), int(torch.isinf(score).sum()))
    mask = torch.zeros(score.numel(), dtype=torch.bool, device="cpu")
    mask[score.flatten().topk(wanted).indices] = True
    return mask.view_as(score)


def options(names: Sequence[str], dropping: Sequence[Tensor], layout: TokenLayout) -> Any:
    """Return (pattern, mask) of every candidate, [layer][head].

    dropping  [layer]: (H, R, C) `order_of_dropping`
    """
    return tuple(layer_options(names, of_layer, layout) for of_layer in dropping)


def layer_options(names: Sequence[str], dropping: Tensor, layout: TokenLayout) -> Any:
    """Return (pattern, mask) of every candidate, [head]; dense first, the same number per head."""
    dense = (None, torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool, device="cpu"))
    shared = geometric(names, layout)
    of_heads: list[list[tuple[PatternLike | None, Tensor]]] = [[] for _ in dropping]
    if "static" in names:
        of_heads = [
            [dense if mask.all() else (pattern, mask) for pattern, mask in head]
            for head in static(dropping, layout)
        ]
    return tuple((dense, *shared, *head) for head in of_heads)


def nearest_half(head: Sequence[tuple[Any, Tensor]]) -> int:
    """Return the index of the candidate that skips about half of the blocks.

    Static candidates come before geometric ones of the same density.
    """
    return min(range(len(head)), key=lambda i: (abs(head[i][1].float().mean().item() - 0.5), -i))

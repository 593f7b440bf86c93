"""What a head may do: one table of candidates, from nothing skipped to nearly everything.

Blocks with special tokens are always kept, a block sees itself, and every row keeps at least two blocks.
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

# Name -> parameters to try; densities are those of the whole map, special blocks included.
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
DENSITIES = (0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75)
NAMES = ("static", *GEOMETRIC)
COMPARED = 64  # blocks of a row among which the best are chosen together


def geometric(names: Sequence[str], layout: TokenLayout) -> list[tuple[PatternLike, Tensor]]:
    """The patterns of these names that skip something and keep two blocks a row, each with its (R, C) mask; no mask twice."""
    found: list[tuple[PatternLike, Tensor]] = []
    for name in names:
        for pattern in GEOMETRIC.get(name, ()):
            mask = pattern(layout)
            new = not any(torch.equal(mask, other) for _, other in found)
            if new and not mask.all() and bool((mask.sum(-1) >= min(2, layout.num_blocks)).all()):
                found.append((pattern, mask))
    return found


def compared(statistics: BlockStatistics, layout: TokenLayout) -> Tensor:
    """(H, R, K) blocks of each row among which `static` chooses with care: all, or the `COMPARED` of largest `drop`, special ones first."""
    blocks = layout.num_blocks
    if blocks <= COMPARED:
        return torch.arange(blocks, device="cpu").expand(*statistics.drop.shape[:2], blocks)
    return _forced(statistics, layout).topk(COMPARED).indices


def static(dropping: Tensor, layout: TokenLayout) -> list[list[tuple[PatternLike, Tensor]]]:
    """Per head, the best blocks at each of `DENSITIES`: those that `order_of_dropping` (H, R, C) drops last."""
    maps = [[_highest(head, density) for density in DENSITIES] for head in dropping]
    return [[(Static(mask, layout), mask) for mask in head] for head in maps]


def order_of_dropping(statistics: BlockStatistics, layout: TokenLayout, among: Tensor) -> Tensor:
    """(H, R, C) float64: the higher, the later a block is dropped; infinite: never. `among` is what `statistics.gram` is about.

    In each row, block by block, the one whose loss adds least to the squared change of the output by all blocks dropped so far: y^T G y / m^2 with
    y the blocks kept, G their products and m the mass they keep. (All blocks together change nothing, so those kept change as much as those
    dropped.) Blocks that are not `among` go first, by `drop`. Rows then share the head's budget by what their next block costs.
    """
    score = _forced(statistics, layout)
    rest = torch.ones_like(score, dtype=torch.bool).scatter_(-1, among, False) & score.isfinite()
    costs, steps = _dropping(
        statistics.gram, _shares(statistics).gather(-1, among), score.gather(-1, among).isfinite()
    )
    early = _ranks(score.masked_fill(~rest, torch.inf), score) - score.numel()  # before all others
    order = torch.where(rest, early, score).scatter(-1, among, _ranks(costs, steps))
    return order.masked_fill(score.isinf(), torch.inf)


def _forced(statistics: BlockStatistics, layout: TokenLayout) -> Tensor:
    """`drop`, infinite for special blocks and the best two of each row."""
    score = statistics.drop.masked_fill(Pattern("special")(layout), torch.inf)
    return score.scatter(-1, score.topk(min(2, layout.num_blocks)).indices, torch.inf)


def _shares(statistics: BlockStatistics) -> Tensor:
    """(H, R, C) mean attention, each row adding up to 1."""
    return statistics.mass / statistics.mass.sum(-1, keepdim=True).clamp(min=1e-300)


def _dropping(gram: Tensor, mass: Tensor, may: Tensor) -> tuple[Tensor, Tensor]:
    """(H, R, K, K), (H, R, K), (H, R, K) bool -> (H, R, K) what dropping each block adds, and (H, R, K) when in its row it goes; infinite: never.

    Never less than those before it in the row cost, so that rows are compared by all that must go first.
    """
    kept, products = torch.ones_like(mass), gram.sum(-1)  # of each block with those kept
    squared, share, diagonal = products.sum(-1), mass.sum(-1), gram.diagonal(dim1=-2, dim2=-1)
    costs, steps = torch.full_like(mass, torch.inf), torch.full_like(mass, torch.inf)
    highest = torch.zeros_like(share)
    for step in range(mass.shape[-1]):
        left = (share[..., None] - mass).clamp(min=1e-6)
        after = (squared[..., None] - 2 * products + diagonal).clamp(min=0) / left.square()
        after = after.masked_fill(~may | (kept == 0), torch.inf)
        least, best = after.min(-1, keepdim=True)
        goes = least.isfinite()  # (H, R, 1)
        if not goes.any():
            break
        highest = torch.maximum(highest, least[..., 0] - squared / share.clamp(min=1e-6).square())
        chosen = torch.zeros_like(kept).scatter_(-1, best, 1.0) * goes
        costs = torch.where(chosen > 0, highest[..., None], costs)
        steps = torch.where(chosen > 0, float(step), steps)
        squared = squared + (chosen * (diagonal - 2 * products)).sum(-1)
        products = products - (gram * chosen[..., None]).sum(-2)
        share, kept = share - (chosen * mass).sum(-1), kept - chosen
    return costs, steps


def _ranks(values: Tensor, ties: Tensor) -> Tensor:
    """(H, R, K) -> the same as places in their head's order, 0 the lowest; equal values in the order of `ties`."""
    by_tie = ties.flatten(1).argsort(dim=-1, stable=True)
    order = by_tie.gather(-1, values.flatten(1).gather(-1, by_tie).argsort(dim=-1, stable=True))
    places = torch.arange(order.shape[-1], dtype=torch.float64, device="cpu").expand_as(order)
    return torch.empty_like(places).scatter_(-1, order, places).view_as(values)


def _highest(score: Tensor, density: float) -> Tensor:
    """(R, C) -> the blocks of the highest score, as many as `density` says, and never fewer than those of infinite score."""
    wanted = max(round(density * score.numel()), int(torch.isinf(score).sum()))
    mask = torch.zeros(score.numel(), dtype=torch.bool, device="cpu")
    mask[score.flatten().topk(wanted).indices] = True
    return mask.view_as(score)


def options(names: Sequence[str], dropping: Sequence[Tensor], layout: TokenLayout) -> Any:
    """[layer][head]: (pattern, mask) of every candidate; `dropping` is (H, R, C) for each layer."""
    return tuple(layer_options(names, own, layout) for own in dropping)


def layer_options(names: Sequence[str], dropping: Tensor, layout: TokenLayout) -> Any:
    """[head]: (pattern, mask) of every candidate, dense first; as many for each head."""
    dense = (None, torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool, device="cpu"))
    shared = geometric(names, layout)
    own: list[list[tuple[PatternLike | None, Tensor]]] = [[] for _ in dropping]
    if "static" in names:
        own = [
            [dense if mask.all() else (pattern, mask) for pattern, mask in head]
            for head in static(dropping, layout)
        ]
    return tuple((dense, *shared, *head) for head in own)


def nearest_half(head: Sequence[tuple[Any, Tensor]]) -> int:
    """The candidate that skips about half of the blocks, best blocks before geometry."""
    return min(range(len(head)), key=lambda i: (abs(head[i][1].float().mean().item() - 0.5), -i))

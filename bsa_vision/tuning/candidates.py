"""What a head may do: one table of candidates, from nothing skipped to nearly everything.

Blocks with special tokens are always kept, a block sees itself, and every row keeps at least two blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bsa_vision.plan import PatternLike
from bsa_vision.static_mask import Static
from bsa_vision.tuning.statistics import BlockStatistics
from masks import Pattern, TokenLayout

# Name -> parameters to try; densities are those of the whole map, special blocks included.
GEOMETRIC: dict[str, tuple[Pattern, ...]] = {
    "local_window": tuple(Pattern("local_window", radius=radius) for radius in (1, 2, 3, 4, 6, 8, 12, 16, 24)),
    "axial": tuple(Pattern("axial", width=width) for width in (0, 2, 4)),
    "strided": tuple(Pattern("local_window", radius=1) | Pattern("strided", stride=stride) for stride in (2, 4, 8)),
    "special": (Pattern("special") | Pattern("local_window", radius=0),),
}
DENSITIES = (0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75)
NAMES = ("static", *GEOMETRIC)


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


def static(statistics: BlockStatistics, layout: TokenLayout) -> list[list[tuple[PatternLike, Tensor]]]:
    """Per head, the best blocks at each of `DENSITIES`: those whose loss would change the output most, images taken together."""
    score = statistics.drop.masked_fill(Pattern("special")(layout), torch.inf)  # (H, R, C)
    score.scatter_(-1, score.topk(min(2, layout.num_blocks)).indices, torch.inf)
    maps = [[_highest(head, density) for density in DENSITIES] for head in score]
    return [[(Static(mask, layout), mask) for mask in head if not mask.all()] for head in maps]


def _highest(score: Tensor, density: float) -> Tensor:
    """(R, C) -> the blocks of the highest score, as many as `density` says, and never fewer than those of infinite score."""
    wanted = max(round(density * score.numel()), int(torch.isinf(score).sum()))
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().topk(wanted).indices] = True
    return mask.view_as(score)

"""Draw what a block of queries attends to, over the image. Needs matplotlib (the `plots` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bsa_vision.masks import TokenLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class View:
    """One head's mask on one layout, for one block of queries."""

    title: str
    layout: TokenLayout
    mask: Tensor  # (R, C) bool
    query_block: int

    def patches(self) -> tuple[Tensor, Tensor]:
        """Return the patches of the query block and those it attends to, (h, w) bool each."""
        blocks = self.layout.block_of
        queries, keys = blocks == self.query_block, self.mask[self.query_block].cpu()[blocks]
        return _to_grid(self.layout, queries), _to_grid(self.layout, keys)


def block_at(layout: TokenLayout, row: int, column: int) -> int:
    """Return the block that holds the patch (row, column)."""
    if not (0 <= row < layout.grid[0] and 0 <= column < layout.grid[1]):
        raise ValueError(
            f"patch ({row}, {column}) lies outside the grid {layout.grid}: choose one inside."
        )
    packed = int(layout.inverse[layout.num_prefix_tokens + row * layout.grid[1] + column])
    return packed // layout.block_size


def plot_views(image: Any, views: Sequence[View]) -> Figure:
    """Draw the image (H, W, 3) once per view.

    Patches that the query block attends to are bright, others dark, the query block orange.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(views), 4.5), layout="constrained")
    for axes, view in zip(figure.subplots(1, len(views), squeeze=False)[0], views, strict=True):
        queries, visible = view.patches()
        height, width = view.layout.grid
        extent = (0, width, height, 0)
        axes.imshow(np.asarray(image), extent=extent, aspect="equal")
        shade = np.zeros((height, width, 4))
        shade[..., 3] = np.where(visible, 0.0, 0.72)
        axes.imshow(shade, extent=extent, interpolation="nearest")
        fill = np.zeros((height, width, 4))
        fill[queries.numpy()] = (1.0, 0.55, 0.0, 0.55)
        axes.imshow(fill, extent=extent, interpolation="nearest")
        axes.set_title(
            f"{view.title}\n{visible.float().mean().item():.0%} of the patches in view", fontsize=10
        )
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def _to_grid(layout: TokenLayout, tokens: Tensor) -> Tensor:
    """Return packed bool tokens (N,) as patches (h, w)."""
    first = layout.num_prefix_tokens
    patches = tokens[layout.inverse][first : first + layout.num_patches]
    return patches.to(torch.bool).reshape(layout.grid)

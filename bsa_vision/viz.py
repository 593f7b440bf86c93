"""Data to picture: what a block of queries may see, on the photograph. Needs matplotlib (the `plots` extra)."""

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
    """One head's mask on one layout, seen from one block of queries."""

    title: str
    layout: TokenLayout
    mask: Tensor  # (R, C) bool
    query_block: int

    def patches(self) -> tuple[Tensor, Tensor]:
        """(h, w) bool: the patches of the query block, and the patches it may see."""
        return _to_grid(self.layout, self.layout.block_of == self.query_block), _to_grid(
            self.layout, self.mask[self.query_block].cpu()[self.layout.block_of]
        )


def block_at(layout: TokenLayout, row: int, column: int) -> int:
    """The block that holds the patch (row, column)."""
    if not (0 <= row < layout.grid[0] and 0 <= column < layout.grid[1]):
        raise ValueError(
            f"patch ({row}, {column}) lies outside the grid {layout.grid}: choose a patch inside it."
        )
    packed = int(layout.inverse[layout.num_prefix_tokens + row * layout.grid[1] + column])
    return packed // layout.block_size


def plot_views(image: Any, views: Sequence[View]) -> Figure:
    """The image (H, W, 3) once per view: what the query block sees is bright, the rest dark, the query block outlined."""
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
    """Packed bool tokens (N,) -> patches (h, w)."""
    patches = tokens[layout.inverse][
        layout.num_prefix_tokens : layout.num_prefix_tokens + layout.num_patches
    ]
    return patches.to(torch.bool).reshape(layout.grid)

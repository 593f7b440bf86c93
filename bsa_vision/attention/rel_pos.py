"""SAM's decomposed relative position in factored form, without the N x N bias.

    logit[i, j] = scale * q_i . k_j + rel_h[i, y(j)] + rel_w[i, x(j)]

where rel_h[i, y] = q_i . Rh[y(i), y] and rel_w[i, x] = q_i . Rw[x(i), x] with the unscaled q. All
heads share the tables.

Source: segment_anything, `add_decomposed_rel_pos` (after MViTv2, arXiv 2112.01526).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RelPos(NamedTuple):
    """Factored relative position of every query, in model order.

    rel_h  (B, H, N, h) term of each key row
    rel_w  (B, H, N, w) term of each key column
    """

    rel_h: Tensor
    rel_w: Tensor


def decompose(q: Tensor, table_h: Tensor, table_w: Tensor, grid: tuple[int, int]) -> RelPos:
    """Return the factored terms of unscaled queries.

    q                 (B, H, h * w, D) in raster order, without special tokens
    table_h, table_w  (2 * h - 1, D) and (2 * w - 1, D), one row per relative distance, as in
                      segment_anything
    """
    height, width = grid
    if q.shape[2] != height * width:
        raise ValueError(
            f"q has {q.shape[2]} tokens, the grid {height} x {width} = {height * width}: they must "
            "be equal."
        )
    for name, table, side in (("table_h", table_h, height), ("table_w", table_w, width)):
        if table.shape != (2 * side - 1, q.shape[-1]):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: expected ({2 * side - 1}, {q.shape[-1]}) "
                f"for a side of {side}; use rel_pos.resize_table first."
            )
    by_patch = q.unflatten(2, grid)  # (B, H, h, w, D)
    rel_h = torch.einsum("bnyxd,ykd->bnyxk", by_patch, table_h[_distances(height, q.device)])
    rel_w = torch.einsum("bnyxd,xkd->bnyxk", by_patch, table_w[_distances(width, q.device)])
    return RelPos(rel_h.flatten(2, 3), rel_w.flatten(2, 3))  # (B, H, N, h), (B, H, N, w)


def resize_table(table: Tensor, side: int) -> Tensor:
    """Resize a table (L, D) to (2 * side - 1, D) by linear interpolation.

    Source: segment_anything, `get_rel_pos`. A table of this size is returned unchanged.
    """
    length = 2 * side - 1
    if len(table) == length:
        return table
    return F.interpolate(table.T[None].float(), size=length, mode="linear")[0].T.to(table.dtype)


def _distances(side: int, device: torch.device) -> Tensor:
    """Return the table row of each pair of query and key positions, (side, side)."""
    position = torch.arange(side, device=device)
    return position[:, None] - position[None] + side - 1

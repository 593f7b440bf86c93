"""SAM's decomposed relative position, kept factored: two small tables of products instead of an N x N bias.

    logit[i, j] = scale * q_i . k_j + rel_h[i, y(j)] + rel_w[i, x(j)]

with rel_h[i, y] = q_i . Rh[y(i), y] and rel_w[i, x] = q_i . Rw[x(i), x] from the unscaled q, shared tables for all heads.
Source: segment_anything, `add_decomposed_rel_pos` (after MViTv2, arXiv 2112.01526).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RelPos(NamedTuple):
    """The factored term of every query, in model order like q.

    rel_h  (B, H, N, h) what each key row adds
    rel_w  (B, H, N, w) what each key column adds
    """

    rel_h: Tensor
    rel_w: Tensor


def decompose(q: Tensor, table_h: Tensor, table_w: Tensor, grid: tuple[int, int]) -> RelPos:
    """The factored term of unscaled queries q (B, H, h * w, D), raster order, no special tokens.

    table_h  (2 * h - 1, D), table_w (2 * w - 1, D): one row per relative distance, as segment_anything stores them
    """
    height, width = grid
    if q.shape[2] != height * width:
        raise ValueError(
            f"q has {q.shape[2]} tokens, the grid {height} x {width} = {height * width}: they must be equal."
        )
    for name, table, side in (("table_h", table_h, height), ("table_w", table_w, width)):
        if table.shape != (2 * side - 1, q.shape[-1]):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: expected ({2 * side - 1}, {q.shape[-1]}) for a side of {side}; "
                "interpolate the table first."
            )
    by_patch = q.unflatten(2, grid)  # (B, H, h, w, D)
    rel_h = torch.einsum("bnyxd,ykd->bnyxk", by_patch, table_h[_distances(height, q.device)])
    rel_w = torch.einsum("bnyxd,xkd->bnyxk", by_patch, table_w[_distances(width, q.device)])
    return RelPos(rel_h.flatten(2, 3), rel_w.flatten(2, 3))  # (B, H, N, h), (B, H, N, w)


def resize_table(table: Tensor, side: int) -> Tensor:
    """(L, D) -> (2 * side - 1, D), linearly interpolated as segment_anything's `get_rel_pos` does it; itself where it fits."""
    length = 2 * side - 1
    if len(table) == length:
        return table
    return F.interpolate(table.T[None].float(), size=length, mode="linear")[0].T.to(table.dtype)


def _distances(side: int, device: torch.device) -> Tensor:
    """(side, side) table row of the distance from query position to key position."""
    position = torch.arange(side, device=device)
    return position[:, None] - position[None] + side - 1

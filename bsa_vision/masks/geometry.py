"""Turn image geometry into block masks: functions from a `TokenLayout` to (R, C) bool, True = compute.

Every function keeps the rows and columns of blocks that hold special tokens (`keep_special`). Those
with a `keys` argument take a second layout for the columns: remembered frames, in each of which a
place is the same place. Union and intersection of masks are `|` and `&`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsa_vision.masks.layout import TokenLayout, whole_number, whole_pair
from bsa_vision.masks.origin import laid_out
from bsa_vision.masks.sparsity import keep_highest, num_kept
from bsa_vision.masks.special_tokens import keep_special

Box = tuple[int, int, int, int]  # see `prompt_region`


@laid_out
def dense(layout: TokenLayout, keys: TokenLayout | None = None) -> Tensor:
    """Every block sees every block."""
    return torch.ones(
        layout.num_blocks, (keys or layout).num_blocks, dtype=torch.bool, device="cpu"
    )


@laid_out
def local_window(
    layout: TokenLayout, radius: int = 8, metric: str = "chebyshev", keys: TokenLayout | None = None
) -> Tensor:
    """Blocks with at least one pair of patches within `radius` patches of each other (any-rule).

    A neighbourhood around every query: raster rows give a band, tiles a band of tiles.

        █▓░░░░
        ▓█▓░░░      ▓ holds at least one pair close enough
        ░▓█▓░░
    """
    return keep_special(
        layout, layout.block_distance(metric, keys) <= whole_number("radius", radius, 0), keys
    )


@laid_out
def axial(layout: TokenLayout, width: int = 0, keys: TokenLayout | None = None) -> Tensor:
    """Blocks with at least one pair of patches whose rows, or whose columns, differ by at most `width` (any-rule)."""
    return keep_special(
        layout, layout.block_distance("axis", keys) <= whole_number("width", width, 0), keys
    )


@laid_out
def nearest(layout: TokenLayout, sparsity: float = 0.5, metric: str = "chebyshev") -> Tensor:
    """The k nearest blocks of each row, k = max(1, round((1 - sparsity) * C)).

    Sorted by `block_distance`, ties by the distance of centroids, then by the lower index.
    """
    return keep_special(
        layout,
        nearest_among(layout, torch.arange(layout.num_blocks, device="cpu"), sparsity, metric),
    )


def nearest_among(
    layout: TokenLayout, blocks: Tensor, sparsity: float, metric: str = "chebyshev"
) -> Tensor:
    """(R, C) bool: each of `blocks` (M,) keeps the k nearest of `blocks`, k from M alone; other rows are empty."""
    distance = layout.block_distance(metric)[blocks][:, blocks]
    by_centroid = layout.centroid_distance()[blocks][:, blocks].sort(dim=1, stable=True).indices
    by_distance = distance.gather(1, by_centroid).sort(dim=1, stable=True).indices
    kept = by_centroid.gather(1, by_distance)[:, : num_kept(sparsity, len(blocks))]
    mask = torch.zeros(layout.num_blocks, layout.num_blocks, dtype=torch.bool, device="cpu")
    mask[blocks[:, None], blocks[kept]] = True
    return mask


@laid_out
def strided(layout: TokenLayout, stride: int = 2) -> Tensor:
    """Block columns 0, stride, 2 * stride, ...: every query sees the same regular sample of key blocks."""
    columns = torch.arange(layout.num_blocks, device="cpu") % whole_number("stride", stride, 1) == 0
    return keep_special(layout, columns.expand(layout.num_blocks, -1))


@laid_out
def random_blocks(
    layout: TokenLayout, sparsity: float = 0.5, seed: int = 0, stream: int = 0
) -> Tensor:
    """k random blocks in each row, its own among them; k as in `nearest`.

    seed, stream  together choose the draw: streams of one seed are independent (a plan gives every head its own).
    """
    generator = torch.Generator(device="cpu").manual_seed(
        (whole_number("seed", seed, 0) * 1_000_003 + stream) % 2**63
    )
    shape = (layout.num_blocks, layout.num_blocks)
    score = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
    score.fill_diagonal_(2.0)
    return keep_special(layout, keep_highest(score, sparsity))


@laid_out
def region(
    layout: TokenLayout, centers: Sequence[tuple[int, int]], radius: int = 8, metric: str = "l1"
) -> Tensor:
    """Patches within `radius` of any of `centers` (row, column) see each other (any-rule); no other pair does."""
    radius = whole_number("radius", radius, 0)
    focus = torch.zeros(layout.num_blocks, dtype=torch.bool, device="cpu")
    for row, column in center_pairs(centers):
        focus |= layout.distance_to_patch(row, column, metric) <= radius
    return keep_special(layout, focus[:, None] & focus[None])


def center_pairs(centers: Any) -> list[tuple[int, int]]:
    if not isinstance(centers, Sequence) or isinstance(centers, str):
        raise ValueError(
            f"centers={centers!r}: expected a list of (row, column) pairs in patches; give e.g. [(10, 20)]."
        )
    return [whole_pair("center", center, 0) for center in centers]


@laid_out
def prompt_region(
    layout: TokenLayout, radius: int = 8, near: int = 2, boxes: Sequence[Box] = ()
) -> Tensor:
    """Patches within `radius` of a prompt see each other; beyond that, every patch sees those within `near` (both L1, any-rule).

    boxes  (top, left, bottom, right) in patches, both ends included: where the prompts are; a click is a box of one patch

    A dynamic pattern: in a plan, `boxes` come with the images (`bsa.context`). With clicks, the masks are those of
    `generate_sam_region_focused_mask`.
    """
    radius = whole_number("radius", radius, 0)
    focus = torch.zeros(layout.num_blocks, dtype=torch.bool, device="cpu")
    for box in boxes:
        focus |= layout.distance_to_box(*box) <= radius
    return keep_special(layout, (focus[:, None] & focus[None])) | local_window(layout, near, "l1")


@laid_out
def window(layout: TokenLayout, size: int = 14, shift: int = 0) -> Tensor:
    """Blocks that share a window of size x size patches, the windows moved by `shift` patches (any-rule).

    Swin's two layouts are shift 0 and shift size // 2, which moves the borders by half a window; at the rim the windows are cut off,
    as Swin's masks cut them. Exact when every block lies in one window (say `tile=(size, size), block_size=size * size`, shift 0),
    a cover of it otherwise: `window_is_exact` tells.
    """
    holds = _windows_of_blocks(layout, size, shift)
    return keep_special(layout, holds @ holds.T > 0)


def window_is_exact(layout: TokenLayout, size: int = 14, shift: int = 0) -> bool:
    """Whether `window` keeps exactly the pairs of patches that share a window: no block holds two windows' patches, or special tokens too."""
    holds = _windows_of_blocks(layout, size, shift)
    if int(holds.any(0).sum()) == 1:  # all of the image
        return True
    windows = holds.sum(1)
    return bool((windows <= 1).all()) and not bool((layout.special_blocks & (windows > 0)).any())


def _windows_of_blocks(layout: TokenLayout, size: int, shift: int) -> Tensor:
    """(R, windows) float32: 1 where a block holds a patch of a window."""
    size, shift = whole_number("size", size, 1), whole_number("shift", shift, 0)
    row, column = layout.coordinates
    patches = row >= 0
    across = (layout.grid[1] + size - 1 + shift) // size + 1
    index = ((row[patches] + size - shift % size) // size) * across + (
        column[patches] + size - shift % size
    ) // size
    holds = torch.zeros(layout.num_blocks, int(index.max()) + 1, device="cpu", dtype=torch.float32)
    holds[layout.block_of[patches], index] = 1
    return holds

"""Build block masks from image geometry: `TokenLayout` -> (R, C) bool, True = compute.

All functions keep the rows and columns of blocks that hold special tokens (`keep_special`). The
argument `keys` is a second layout for the columns, e.g. memory frames; patch positions are the same
in every frame. Join masks with `|` and `&`. "Any-rule": a block pair is kept if at least one of its
patch pairs qualifies.
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
    """Keep every block."""
    shape = (layout.num_blocks, (keys or layout).num_blocks)
    return torch.ones(shape, dtype=torch.bool, device="cpu")


@laid_out
def local_window(
    layout: TokenLayout, radius: int = 8, metric: str = "chebyshev", keys: TokenLayout | None = None
) -> Tensor:
    """Keep blocks with at least one pair of patches at a distance <= `radius` (any-rule).

    This is a neighbourhood around every query. In raster order the mask is a band.

        █▓░░░░
        ▓█▓░░░      ▓ has at least one pair within the radius
        ░▓█▓░░
    """
    near = layout.block_distance(metric, keys) <= whole_number("radius", radius, 0)
    return keep_special(layout, near, keys)


@laid_out
def axial(layout: TokenLayout, width: int = 0, keys: TokenLayout | None = None) -> Tensor:
    """Keep blocks with a pair of patches whose rows or columns differ by <= `width` (any-rule)."""
    near = layout.block_distance("axis", keys) <= whole_number("width", width, 0)
    return keep_special(layout, near, keys)


@laid_out
def nearest(layout: TokenLayout, sparsity: float = 0.5, metric: str = "chebyshev") -> Tensor:
    """Keep the k nearest blocks in each row, k = max(1, round((1 - sparsity) * C)).

    Blocks are sorted by `block_distance`, then by centroid distance, then by index.
    """
    blocks = torch.arange(layout.num_blocks, device="cpu")
    return keep_special(layout, nearest_among(layout, blocks, sparsity, metric))


def nearest_among(
    layout: TokenLayout, blocks: Tensor, sparsity: float, metric: str = "chebyshev"
) -> Tensor:
    """Keep the k nearest of `blocks` (M,) for each of `blocks`; other rows are empty.

    k = max(1, round((1 - sparsity) * M)). Returns (R, C) bool.
    """
    distance = layout.block_distance(metric)[blocks][:, blocks]
    by_centroid = layout.centroid_distance()[blocks][:, blocks].sort(dim=1, stable=True).indices
    by_distance = distance.gather(1, by_centroid).sort(dim=1, stable=True).indices
    kept = by_centroid.gather(1, by_distance)[:, : num_kept(sparsity, len(blocks))]
    mask = torch.zeros(layout.num_blocks, layout.num_blocks, dtype=torch.bool, device="cpu")
    mask[blocks[:, None], blocks[kept]] = True
    return mask


@laid_out
def strided(layout: TokenLayout, stride: int = 2) -> Tensor:
    """Keep block columns 0, stride, 2 * stride, ... for every query."""
    columns = torch.arange(layout.num_blocks, device="cpu") % whole_number("stride", stride, 1) == 0
    return keep_special(layout, columns.expand(layout.num_blocks, -1))


@laid_out
def random_blocks(
    layout: TokenLayout, sparsity: float = 0.5, seed: int = 0, stream: int = 0
) -> Tensor:
    """Keep k random blocks in each row, including the diagonal; k as in `nearest`.

    seed, stream  select the random draw; streams of one seed are independent (a plan uses one
                  stream per head)
    """
    state = (whole_number("seed", seed, 0) * 1_000_003 + stream) % 2**63
    generator = torch.Generator(device="cpu").manual_seed(state)
    shape = (layout.num_blocks, layout.num_blocks)
    score = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
    score.fill_diagonal_(2.0)
    return keep_special(layout, keep_highest(score, sparsity))


@laid_out
def region(
    layout: TokenLayout, centers: Sequence[tuple[int, int]], radius: int = 8, metric: str = "l1"
) -> Tensor:
    """Keep pairs of patches that are both within `radius` of any of `centers` (any-rule).

    centers  (row, column) in patches
    """
    radius = whole_number("radius", radius, 0)
    focus = torch.zeros(layout.num_blocks, dtype=torch.bool, device="cpu")
    for row, column in center_pairs(centers):
        focus |= layout.distance_to_patch(row, column, metric) <= radius
    return keep_special(layout, focus[:, None] & focus[None])


def center_pairs(centers: Any) -> list[tuple[int, int]]:
    """Return `centers` as (row, column) pairs; raise ValueError if they are not."""
    if not isinstance(centers, Sequence) or isinstance(centers, str):
        raise ValueError(
            f"centers={centers!r}: expected a list of (row, column) pairs in patches, e.g. "
            "[(10, 20)]."
        )
    return [whole_pair("center", center, 0) for center in centers]


@laid_out
def prompt_region(
    layout: TokenLayout, radius: int = 8, near: int = 2, boxes: Sequence[Box] = ()
) -> Tensor:
    """Keep pairs of patches near a prompt, and pairs near each other (L1 distances, any-rule).

    radius  distance to a prompt, for both patches of a pair
    near    distance between the patches of all other pairs
    boxes   prompts as (top, left, bottom, right) in patches, both ends included; a click is a box
            of one patch

    This pattern is dynamic: in a plan, `boxes` come with the images (`bsa.context`). For clicks,
    the masks equal those of `generate_sam_region_focused_mask`.
    """
    radius = whole_number("radius", radius, 0)
    focus = torch.zeros(layout.num_blocks, dtype=torch.bool, device="cpu")
    for box in boxes:
        focus |= layout.distance_to_box(*box) <= radius
    return keep_special(layout, (focus[:, None] & focus[None])) | local_window(layout, near, "l1")


@laid_out
def window(layout: TokenLayout, size: int = 14, shift: int = 0) -> Tensor:
    """Keep blocks with patches in the same window of size x size patches (any-rule).

    shift  offset of the windows in patches; Swin uses 0 and size // 2. Windows are cut at the image
           border, as in Swin's masks

    The mask is exact if every block lies in one window, e.g. with
    `tile=(size, size), block_size=size * size, shift=0`; otherwise it is a cover, a superset of
    the windows. See `window_is_exact`.
    """
    in_window = _windows_of_blocks(layout, size, shift)
    return keep_special(layout, in_window @ in_window.T > 0)


def window_is_exact(layout: TokenLayout, size: int = 14, shift: int = 0) -> bool:
    """Return whether `window` keeps exactly the pairs of patches that share a window.

    False if a block has patches of several windows, or patches and special tokens.
    """
    in_window = _windows_of_blocks(layout, size, shift)
    if int(in_window.any(0).sum()) == 1:  # one window covers the image
        return True
    windows = in_window.sum(1)
    return bool((windows <= 1).all()) and not bool((layout.special_blocks & (windows > 0)).any())


def _windows_of_blocks(layout: TokenLayout, size: int, shift: int) -> Tensor:
    """Return (R, windows) float32: 1 if the block has a patch in the window."""
    size, shift = whole_number("size", size, 1), whole_number("shift", shift, 0)
    row, column = layout.coordinates
    patches = row >= 0
    windows_per_row = (layout.grid[1] + size - 1 + shift) // size + 1
    window_row, window_column = ((x[patches] + size - shift % size) // size for x in (row, column))
    index = window_row * windows_per_row + window_column
    shape = (layout.num_blocks, int(index.max()) + 1)
    in_window = torch.zeros(shape, device="cpu", dtype=torch.float32)
    in_window[layout.block_of[patches], index] = 1
    return in_window

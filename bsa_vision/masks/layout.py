"""Token layouts: grid, special tokens, order and blocks of an image, and distances between blocks.

Model order    [prefix tokens][patches, row by row][suffix tokens], as in the model
Packed order   raster: model order. tile: [full tiles][ragged tiles][prefix tokens][suffix tokens]
Frames         the patches of all frames in sequence, each frame in its order; the position of a
               patch is the one in its frame

A block is `block_size` consecutive tokens in packed order; the last one may be shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

ORDERS = ("raster", "tile")
METRICS = ("chebyshev", "l1", "axis")


def whole_number(name: str, value: Any, minimum: int) -> int:
    """Return `value` as an int; raise ValueError unless it is an integer >= `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise ValueError(f"{name}={value!r}: expected an integer >= {minimum}.")
    return int(value)


def whole_pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Return `value` as (rows, columns); raise ValueError unless it is a pair of integers."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name}={value!r}: expected a pair (rows, columns) of two ints.")
    rows, columns = value
    return whole_number(f"{name}[0]", rows, minimum), whole_number(f"{name}[1]", columns, minimum)


@dataclass(frozen=True)
class TokenLayout:
    """Tokens of one image: patches and special tokens, their order, and their blocks.

    grid               (h, w) in patches
    num_prefix_tokens  special tokens before the patches (class token, registers)
    num_suffix_tokens  special tokens after the patches (prompts, memory pointers)
    order              "raster", or "tile": full tiles first, then ragged ones, special tokens last
    tile               (rows, columns) in patches, used by order "tile"
    block_size         tokens per block
    frames             number of frames of `grid` patches, for the memory of video models; positions
                       and distances ignore time

    Frozen, hashable and picklable. The returned tensors are on the CPU, cached and shared: do not
    modify them.

        >>> TokenLayout((64, 64), num_prefix_tokens=5, order="tile").num_blocks
        33
    """

    grid: tuple[int, int]
    num_prefix_tokens: int = field(default=0, kw_only=True)
    num_suffix_tokens: int = field(default=0, kw_only=True)
    order: str = field(default="raster", kw_only=True)
    tile: tuple[int, int] = field(default=(8, 16), kw_only=True)
    block_size: int = field(default=128, kw_only=True)
    frames: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", whole_pair("grid", self.grid, 1))
        object.__setattr__(self, "tile", whole_pair("tile", self.tile, 1))
        counts = {"num_prefix_tokens": 0, "num_suffix_tokens": 0, "block_size": 1, "frames": 1}
        for name, minimum in counts.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), minimum))
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}: allowed are {', '.join(map(repr, ORDERS))}.")

    def __setstate__(self, state: dict[str, object]) -> None:
        # Pickles made before 0.1.0 have the attributes `start` and `end`.
        renamed = {"start": "num_prefix_tokens", "end": "num_suffix_tokens"}
        self.__dict__.update({renamed.get(name, name): value for name, value in state.items()})

    @property
    def num_patches(self) -> int:
        """Number of patches in all frames."""
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches + self.num_suffix_tokens

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)

    @property
    def permutation(self) -> Tensor:
        """(N,) int64 model-order index of each packed token: `packed = tokens[permutation]`."""
        return _permutation(self)

    @property
    def inverse(self) -> Tensor:
        """(N,) int64 packed position of each model-order token: `tokens = packed[inverse]`."""
        return _inverse(self)

    @property
    def is_identity(self) -> bool:
        """True if packed order and model order are the same."""
        return _is_identity(self)

    @property
    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Row and column of each packed token, (N,) int64 each; -1 for special tokens."""
        return _coordinates(self)

    @property
    def block_of(self) -> Tensor:
        """(N,) int64 block of each packed token."""
        return torch.arange(self.num_tokens, device="cpu") // self.block_size

    @property
    def special_blocks(self) -> Tensor:
        """(R,) bool, True for blocks that hold at least one special token."""
        return _special_blocks(self)

    def block_distance(self, metric: str = "chebyshev", keys: TokenLayout | None = None) -> Tensor:
        """Return the smallest distance in patches between each pair of blocks, (R, C) int64.

        metric  "chebyshev" = max(|rows|, |columns|), "l1" = |rows| + |columns|,
                "axis" = min(|rows|, |columns|)
        keys    layout of the columns; default this layout

        Special tokens have no position: blocks without patches have distance h + w, more than any
        patch. The result is exact without an N x N tensor: blocks are split into rectangles, whose
        row and column gaps are independent.
        """
        return _block_distance(self, check_metric(metric), self if keys is None else keys)

    def centroid_distance(self) -> Tensor:
        """Return the squared Euclidean distances between the mean patch positions of blocks.

        (R, R) float64, inf for blocks without patches.
        """
        return _centroid_distance(self)

    def distance_to_patch(self, row: int, column: int, metric: str = "l1") -> Tensor:
        """Return the smallest distance from a patch to each block, (R,) int64."""
        row, column = whole_number("row", row, 0), whole_number("column", column, 0)
        return self.distance_to_box(row, column, row, column, metric)

    def distance_to_box(
        self, top: int, left: int, bottom: int, right: int, metric: str = "l1"
    ) -> Tensor:
        """Return the smallest distance from a box of patches to each block, (R,) int64.

        The box includes the rows `top` and `bottom` and the columns `left` and `right`.
        """
        check_metric(metric)
        names = ("top", "left", "bottom", "right")
        top, left, bottom, right = (
            whole_number(n, v, 0) for n, v in zip(names, (top, left, bottom, right), strict=True)
        )
        for row, column in ((top, left), (bottom, right)):
            if row >= self.grid[0] or column >= self.grid[1]:
                raise ValueError(
                    f"patch ({row}, {column}) lies outside the grid of {self.grid[0]} x "
                    f"{self.grid[1]} patches: rows are 0 to {self.grid[0] - 1}, columns 0 to "
                    f"{self.grid[1] - 1}; divide pixels by the patch size first."
                )
        if top > bottom or left > right:
            raise ValueError(
                f"box of patches ({top}, {left}) to ({bottom}, {right}) is empty: expected top <= "
                "bottom and left <= right."
            )
        values = (0, top, bottom, left, right)
        box = Rectangles(*(torch.tensor([value], device="cpu") for value in values))
        rectangles = _rectangles(self)
        return _smallest(_gap(box, rectangles, metric), rectangles.block, self)[0]


def check_metric(metric: str) -> str:
    """Return `metric`; raise ValueError unless it is in `METRICS`."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: allowed are {', '.join(map(repr, METRICS))}.")
    return metric


class Rectangles(NamedTuple):
    """Rectangles of patches, each inside one block; (M,) per field, first and last included."""

    block: Tensor
    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor


# The cached functions leave inference mode, because later calls may need gradients.


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _permutation(layout: TokenLayout) -> Tensor:
    tokens = torch.arange(layout.num_tokens, device="cpu")
    if layout.order == "raster":
        return tokens
    (height, width), (tile_h, tile_w) = layout.grid, layout.tile
    patches = torch.arange(layout.num_patches, device="cpu")
    frame, row, column = patches // (height * width), patches // width % height, patches % width
    tile_row, tile_column = row // tile_h, column // tile_w
    ragged = (tile_row >= height // tile_h) | (tile_column >= width // tile_w)
    key = frame
    for digit, base in (
        (ragged.long(), 2),
        (tile_row, -(-height // tile_h)),
        (tile_column, -(-width // tile_w)),
        (row % tile_h, tile_h),
        (column % tile_w, tile_w),
    ):
        key = key * base + digit
    prefix, suffix = layout.num_prefix_tokens, layout.num_prefix_tokens + layout.num_patches
    return torch.cat([prefix + key.argsort(), tokens[:prefix], tokens[suffix:]])


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _inverse(layout: TokenLayout) -> Tensor:
    return layout.permutation.argsort()


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _is_identity(layout: TokenLayout) -> bool:
    return bool((layout.permutation == torch.arange(layout.num_tokens, device="cpu")).all())


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _coordinates(layout: TokenLayout) -> tuple[Tensor, Tensor]:
    patch = layout.permutation - layout.num_prefix_tokens
    special = (patch < 0) | (patch >= layout.num_patches)
    height, width = layout.grid
    row, column = patch // width % height, patch % width
    return row.masked_fill(special, -1), column.masked_fill(special, -1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _special_blocks(layout: TokenLayout) -> Tensor:
    rows, _ = layout.coordinates
    blocks = torch.zeros(layout.num_blocks, dtype=torch.bool, device="cpu")
    blocks[layout.block_of[rows < 0]] = True
    return blocks


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _rectangles(layout: TokenLayout) -> Rectangles:
    row, column = layout.coordinates
    patches = row >= 0
    block, row, column = layout.block_of[patches], row[patches], column[patches]
    # Consecutive tokens in the same row and block form a run ...
    first = _starts(block[1:] != block[:-1], row[1:] != row[:-1], column[1:] != column[:-1] + 1)
    last = torch.cat([first[1:] - 1, first.new_tensor([len(row) - 1])])
    block, top, left, right = block[first], row[first], column[first], column[last]
    # ... and runs with the same columns in consecutive rows form a rectangle.
    first = _starts(
        block[1:] != block[:-1],
        top[1:] != top[:-1] + 1,
        left[1:] != left[:-1],
        right[1:] != right[:-1],
    )
    last = torch.cat([first[1:] - 1, first.new_tensor([len(top) - 1])])
    return Rectangles(block[first], top[first], top[last], left[first], right[first])


def _starts(*breaks: Tensor) -> Tensor:
    """Return the indices where a new piece starts: 0, and after each position set in `breaks`."""
    cut = torch.stack(breaks).any(0).nonzero().squeeze(1) + 1
    return torch.cat([cut.new_zeros(1), cut])


def _gap(a: Rectangles, b: Rectangles, metric: str) -> Tensor:
    """Return the smallest distances between rectangles, (len(a), len(b))."""
    rows = torch.maximum(b.top[None] - a.bottom[:, None], a.top[:, None] - b.bottom[None])
    columns = torch.maximum(b.left[None] - a.right[:, None], a.left[:, None] - b.right[None])
    rows, columns = rows.clamp_(min=0), columns.clamp_(min=0)
    if metric == "l1":
        return rows + columns
    return torch.maximum(rows, columns) if metric == "chebyshev" else torch.minimum(rows, columns)


def _smallest(values: Tensor, block: Tensor, layout: TokenLayout) -> Tensor:
    """Return the minimum over the columns of each block: (A, M) values -> (A, blocks).

    block  (M,) block in `layout` of each column
    """
    far = values.new_full((values.shape[0], layout.num_blocks), sum(layout.grid))
    return far.scatter_reduce_(1, block.expand_as(values), values, "amin")


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _block_distance(layout: TokenLayout, metric: str, keys: TokenLayout) -> Tensor:
    queries, rectangles = _rectangles(layout), _rectangles(keys)
    # In chunks of query rectangles, to limit memory to a few MB for layouts with very many of them.
    step = max(1, 500_000 // len(rectangles.block))
    chunks = []
    for i in range(0, len(queries.block), step):
        chunk = Rectangles(*(x[i : i + step] for x in queries))
        chunks.append(_smallest(_gap(chunk, rectangles, metric), rectangles.block, keys))
    to_blocks = torch.cat(chunks)  # (M, C)
    return _smallest(to_blocks.T.contiguous(), queries.block, layout).T.contiguous()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _centroid_distance(layout: TokenLayout) -> Tensor:
    # Sums and counts are integers below 2**53, so equal distances are equal floats: ties stay ties.
    row, column = layout.coordinates
    patches = row >= 0
    zeros = torch.zeros(layout.num_blocks, dtype=torch.float64, device="cpu")
    block = layout.block_of[patches]
    count = zeros.scatter_add(0, block, torch.ones(len(block), dtype=torch.float64, device="cpu"))
    squared = torch.zeros(layout.num_blocks, layout.num_blocks, dtype=torch.float64, device="cpu")
    for axis in (row, column):
        total = zeros.scatter_add(0, block, axis[patches].double())
        squared += (total[:, None] * count[None] - total[None] * count[:, None]) ** 2
    return (squared / (count[:, None] * count[None]) ** 2).nan_to_num(nan=torch.inf)

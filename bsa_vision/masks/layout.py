"""Where the tokens of one image lie: grid, special tokens, order, blocks, and the distances between blocks.

Model order    [start specials][patches, row by row][end specials]       tokens as the model has them
Packed order   raster: the same. tile: [full tiles][ragged tiles][start specials][end specials]
Frames         the patches of one frame after those of another, each in its order; a patch's place is that in its own frame

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
    """`value` as an int of at least `minimum`, or a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise ValueError(
            f"{name}={value!r}: expected a whole number of at least {minimum}; give {name} as such an int."
        )
    return int(value)


def whole_pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """`value` as (rows, columns), or a ValueError that names the argument."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(
            f"{name}={value!r}: expected a pair (rows, columns); give two ints, rows first."
        )
    return whole_number(f"{name}[0]", value[0], minimum), whole_number(
        f"{name}[1]", value[1], minimum
    )


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one image: a grid of patches with special tokens before and after, in an order, cut into blocks.

    grid        (h, w) in patches
    num_prefix_tokens   special tokens before the patches (class token, registers)
    num_suffix_tokens   special tokens after the patches (prompts, memory pointers)
    order       "raster", or "tile": patches tile by tile, ragged tiles after all full ones, special tokens last
    tile        (rows, columns) in patches, used by order "tile"
    block_size  tokens per block
    frames      how many frames of `grid` patches there are: what a video model remembers. Places, and so distances, know no time

    Frozen, hashable and picklable. The tensors it hands out live on the CPU, are cached and shared: do not write to them.

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
            raise ValueError(
                f"order={self.order!r}: allowed are {', '.join(map(repr, ORDERS))}; choose one of them."
            )

    def __setstate__(self, state: dict[str, object]) -> None:
        # Pickles made before 0.1.0 name the special tokens `start` and `end`.
        old = {"start": "num_prefix_tokens", "end": "num_suffix_tokens"}
        self.__dict__.update({old.get(name, name): value for name, value in state.items()})

    @property
    def num_patches(self) -> int:
        """Of all frames."""
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches + self.num_suffix_tokens

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)

    @property
    def permutation(self) -> Tensor:
        """(N,) int64: the model-order index of each packed token, so that `packed = tokens[permutation]`."""
        return _permutation(self)

    @property
    def inverse(self) -> Tensor:
        """(N,) int64: the packed position of each model-order token, so that `tokens = packed[inverse]`."""
        return _inverse(self)

    @property
    def is_identity(self) -> bool:
        """Whether packed order and model order are the same."""
        return _is_identity(self)

    @property
    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Row and column of each packed token, (N,) int64 each; -1 for special tokens."""
        return _coordinates(self)

    @property
    def block_of(self) -> Tensor:
        """(N,) int64: the block of each packed token."""
        return torch.arange(self.num_tokens, device="cpu") // self.block_size

    @property
    def special_blocks(self) -> Tensor:
        """(R,) bool: blocks that hold at least one special token."""
        return _special_blocks(self)

    def block_distance(self, metric: str = "chebyshev", keys: TokenLayout | None = None) -> Tensor:
        """(R, C) int64: the smallest distance in patches between a token of a block and a token of another, of `keys` (None = this layout).

        metric "chebyshev" = max(|rows|, |columns|), "l1" = |rows| + |columns|, "axis" = min(|rows|, |columns|).
        Special tokens have no place: a block without patches is at distance h + w, farther than any patch.
        Exact: blocks are cut into rectangles, whose row and column gaps are independent; nothing is N x N.
        """
        return _block_distance(self, check_metric(metric), self if keys is None else keys)

    def centroid_distance(self) -> Tensor:
        """(R, R) float64: squared Euclidean distance between the mean patch positions of blocks; inf without patches."""
        return _centroid_distance(self)

    def distance_to_patch(self, row: int, column: int, metric: str = "l1") -> Tensor:
        """(R,) int64: the smallest distance from the patch (row, column) to any patch of each block."""
        row, column = whole_number("row", row, 0), whole_number("column", column, 0)
        return self.distance_to_box(row, column, row, column, metric)

    def distance_to_box(
        self, top: int, left: int, bottom: int, right: int, metric: str = "l1"
    ) -> Tensor:
        """(R,) int64: the smallest distance from any patch of rows top to bottom, columns left to right, both included, to each block."""
        check_metric(metric)
        names = ("top", "left", "bottom", "right")
        top, left, bottom, right = (
            whole_number(n, v, 0) for n, v in zip(names, (top, left, bottom, right), strict=True)
        )
        for row, column in ((top, left), (bottom, right)):
            if row >= self.grid[0] or column >= self.grid[1]:
                raise ValueError(
                    f"patch ({row}, {column}) lies outside the grid of {self.grid[0]} x {self.grid[1]} patches: rows are 0 to "
                    f"{self.grid[0] - 1}, columns 0 to {self.grid[1] - 1}; divide pixels by the patch size first."
                )
        if top > bottom or left > right:
            raise ValueError(
                f"box of patches ({top}, {left}) to ({bottom}, {right}) is empty: top <= bottom and left <= right are needed; swap them."
            )
        box = Rectangles(
            *(torch.tensor([value], device="cpu") for value in (0, top, bottom, left, right))
        )
        rectangles = _rectangles(self)
        return _smallest(_gap(box, rectangles, metric), rectangles.block, self)[0]


def check_metric(metric: str) -> str:
    """`metric`, or a ValueError that names the allowed ones."""
    if metric not in METRICS:
        raise ValueError(
            f"metric={metric!r}: allowed are {', '.join(map(repr, METRICS))}; choose one of them."
        )
    return metric


class Rectangles(NamedTuple):
    """Rectangles of patches, each inside one block: block index, first and last row, first and last column; (M,) each."""

    block: Tensor
    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor


# Outside inference mode, whatever the caller's: these tensors are remembered, and later calls may need gradients.


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
    last_patch = layout.num_prefix_tokens + layout.num_patches
    return torch.cat(
        [
            layout.num_prefix_tokens + key.argsort(),
            tokens[: layout.num_prefix_tokens],
            tokens[last_patch:],
        ]
    )


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
    return (patch // width % height).masked_fill(special, -1), (patch % width).masked_fill(
        special, -1
    )


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
    # Tokens that follow each other in one row of one block form a run ...
    first = _starts(block[1:] != block[:-1], row[1:] != row[:-1], column[1:] != column[:-1] + 1)
    last = torch.cat([first[1:] - 1, first.new_tensor([len(row) - 1])])
    block, top, left, right = block[first], row[first], column[first], column[last]
    # ... and runs of the same columns in successive rows form a rectangle.
    first = _starts(
        block[1:] != block[:-1],
        top[1:] != top[:-1] + 1,
        left[1:] != left[:-1],
        right[1:] != right[:-1],
    )
    last = torch.cat([first[1:] - 1, first.new_tensor([len(top) - 1])])
    return Rectangles(block[first], top[first], top[last], left[first], right[first])


def _starts(*breaks: Tensor) -> Tensor:
    """Indices at which a new piece starts: 0, and wherever one of `breaks` (M - 1,) separates two neighbours."""
    cut = torch.stack(breaks).any(0).nonzero().squeeze(1) + 1
    return torch.cat([cut.new_zeros(1), cut])


def _gap(a: Rectangles, b: Rectangles, metric: str) -> Tensor:
    """(len(a), len(b)) smallest distances between rectangles: the gap of an axis does not depend on the other axis."""
    rows = torch.maximum(b.top[None] - a.bottom[:, None], a.top[:, None] - b.bottom[None]).clamp_(
        min=0
    )
    columns = torch.maximum(
        b.left[None] - a.right[:, None], a.left[:, None] - b.right[None]
    ).clamp_(min=0)
    if metric == "l1":
        return rows + columns
    return torch.maximum(rows, columns) if metric == "chebyshev" else torch.minimum(rows, columns)


def _smallest(values: Tensor, block: Tensor, layout: TokenLayout) -> Tensor:
    """Column minima by block: (A, M) values whose columns belong to `block` (M,) of `layout` -> (A, its blocks)."""
    far = values.new_full((values.shape[0], layout.num_blocks), sum(layout.grid))
    return far.scatter_reduce_(1, block.expand_as(values), values, "amin")


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _block_distance(layout: TokenLayout, metric: str, keys: TokenLayout) -> Tensor:
    queries, rectangles = _rectangles(layout), _rectangles(keys)
    # Query rectangles are taken some at a time, so that odd tiles with very many of them stay within a few MB.
    step = max(1, 500_000 // len(rectangles.block))
    to_blocks = torch.cat(
        [
            _smallest(
                _gap(Rectangles(*(x[i : i + step] for x in queries)), rectangles, metric),
                rectangles.block,
                keys,
            )
            for i in range(0, len(queries.block), step)
        ]
    )  # (M, C)
    return _smallest(to_blocks.T.contiguous(), queries.block, layout).T.contiguous()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _centroid_distance(layout: TokenLayout) -> Tensor:
    # Sums and counts are whole numbers below 2**53, so equal distances come out as equal floats and ties stay ties.
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

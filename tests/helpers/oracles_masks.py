"""Block masks by brute force over token pairs: what `masks/` must equal, written without looking at how it does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import product

import numpy as np
from hypothesis import strategies as st

from bsa_vision.masks import TokenLayout

Position = tuple[int, int] | None  # (row, column) of a patch, None for a special token


def model_order(grid: tuple[int, int], start: int = 0, end: int = 0) -> list[Position]:
    """Tokens as the model has them."""
    patches = list(product(range(grid[0]), range(grid[1])))
    return [*[None] * start, *patches, *[None] * end]


def packed_order(layout: TokenLayout) -> list[int]:
    """The model-order index of each packed token."""
    tokens = model_order(layout.grid, layout.num_prefix_tokens, layout.num_suffix_tokens)
    if layout.order == "raster":
        return list(range(len(tokens)))
    (height, width), (tile_h, tile_w) = layout.grid, layout.tile

    def place(index: int) -> tuple[int, ...]:
        if tokens[index] is None:
            return (2, index)
        row, column = tokens[index]
        tile_row, tile_column = row // tile_h, column // tile_w
        ragged = (tile_row + 1) * tile_h > height or (tile_column + 1) * tile_w > width
        return (int(ragged), tile_row, tile_column, row, column)

    return sorted(range(len(tokens)), key=place)


@dataclass
class Blocks:
    """Tokens in packed order, cut into blocks; pairs of tokens are (N, N), pairs of blocks (R, R)."""

    positions: Sequence[Position]
    grid: tuple[int, int]
    block_size: int

    @classmethod
    def of(cls, layout: TokenLayout) -> Blocks:
        tokens = model_order(layout.grid, layout.num_prefix_tokens, layout.num_suffix_tokens)
        return cls(
            [tokens[index] for index in packed_order(layout)], layout.grid, layout.block_size
        )

    @cached_property
    def count(self) -> int:
        return len(range(0, len(self.positions), self.block_size))

    @cached_property
    def contents(self) -> list[list[Position]]:
        return [
            list(self.positions[i : i + self.block_size])
            for i in range(0, len(self.positions), self.block_size)
        ]

    @cached_property
    def special_tokens(self) -> np.ndarray:
        return np.array([position is None for position in self.positions])

    @cached_property
    def special(self) -> np.ndarray:
        return np.array([None in block for block in self.contents])

    @cached_property
    def rows_columns(self) -> tuple[np.ndarray, np.ndarray]:
        filled = np.array([(0, 0) if position is None else position for position in self.positions])
        return filled[:, 0], filled[:, 1]

    def reduce(self, pairs: np.ndarray, ufunc: np.ufunc) -> np.ndarray:
        """(N, N) -> (R, R)."""
        cuts = np.arange(0, len(self.positions), self.block_size)
        return ufunc.reduceat(ufunc.reduceat(pairs, cuts, axis=0), cuts, axis=1)

    def token_distance(self, metric: str) -> np.ndarray:
        """(N, N); h + w where one of the two is special."""
        row, column = self.rows_columns
        rows, columns = abs(row[:, None] - row), abs(column[:, None] - column)
        if metric == "l1":
            distance = rows + columns
        else:
            distance = {"chebyshev": np.maximum, "axis": np.minimum}[metric](rows, columns)
        nowhere = self.special_tokens[:, None] | self.special_tokens
        return np.where(nowhere, sum(self.grid), distance)

    def distance(self, metric: str = "chebyshev") -> np.ndarray:
        return self.reduce(self.token_distance(metric), np.minimum)

    def any_rule(self, qualifies: np.ndarray) -> np.ndarray:
        """Blocks with at least one pair of tokens that qualifies; special tokens see all and are seen by all."""
        return self.reduce(
            qualifies | self.special_tokens[:, None] | self.special_tokens, np.logical_or
        )

    def within(self, radius: int, metric: str = "l1") -> np.ndarray:
        return self.any_rule(self.token_distance(metric) <= radius)

    def focus(self, positions: Sequence[tuple[int, int]], radius: int) -> np.ndarray:
        """(N,): patches within L1 `radius` of any of `positions`."""
        row, column = self.rows_columns
        near = np.zeros(len(self.positions), dtype=bool)
        for r, c in positions:
            near |= abs(row - r) + abs(column - c) <= radius
        return near & ~self.special_tokens

    def keep_special(self, mask: np.ndarray) -> np.ndarray:
        return mask | self.special[:, None] | self.special

    @cached_property
    def centroids(self) -> list[tuple[Fraction, ...] | None]:
        patches = [
            [position for position in block if position is not None] for block in self.contents
        ]
        return [
            tuple(Fraction(sum(axis), len(block)) for axis in zip(*block, strict=True))
            if block
            else None
            for block in patches
        ]

    def centroid_distance(self, a: int, b: int) -> Fraction | float:
        first, second = self.centroids[a], self.centroids[b]
        if first is None or second is None:
            return float("inf")
        return (first[0] - second[0]) ** 2 + (first[1] - second[1]) ** 2

    def nearest(
        self, k: int, among: Sequence[int] | None = None, metric: str = "chebyshev"
    ) -> np.ndarray:
        """Each of `among` keeps the k nearest of `among`: by distance, then centroids, then the lower index."""
        among = range(self.count) if among is None else among
        distance, mask = self.distance(metric), np.zeros((self.count, self.count), dtype=bool)
        for row in among:
            ranked = sorted(
                (distance[row, column], self.centroid_distance(row, column), column)
                for column in among
            )
            mask[row, [column for *_, column in ranked[:k]]] = True
        return mask


def kept(sparsity: float, columns: int) -> int:
    return max(1, round((1 - sparsity) * columns))


@st.composite
def layouts(draw, orders: Sequence[str] = ("raster", "tile")) -> TokenLayout:
    """Rectangles of any shape, tiles that need not divide them, blocks that may straddle tiles."""
    return TokenLayout(
        (draw(st.integers(1, 12)), draw(st.integers(1, 17))),
        num_prefix_tokens=draw(st.integers(0, 3)),
        num_suffix_tokens=draw(st.sampled_from([0, 0, 1, 5])),
        order=draw(st.sampled_from(orders)),
        tile=(draw(st.integers(1, 5)), draw(st.integers(1, 6))),
        block_size=draw(st.integers(1, 40)),
    )

"""Block masks by brute force over token pairs, independent of `bsa_vision.masks`."""

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
    """List the tokens in model order."""
    patches = list(product(range(grid[0]), range(grid[1])))
    return [*[None] * start, *patches, *[None] * end]


def packed_order(layout: TokenLayout) -> list[int]:
    """Return the model-order index of each packed token."""
    tokens = model_order(layout.grid, layout.num_prefix_tokens, layout.num_suffix_tokens)
    if layout.order == "raster":
        return list(range(len(tokens)))
    (height, width), (tile_h, tile_w) = layout.grid, layout.tile

    def sort_key(index: int) -> tuple[int, ...]:
        if tokens[index] is None:
            return (2, index)
        row, column = tokens[index]
        tile_row, tile_column = row // tile_h, column // tile_w
        ragged = (tile_row + 1) * tile_h > height or (tile_column + 1) * tile_w > width
        return (int(ragged), tile_row, tile_column, row, column)

    return sorted(range(len(tokens)), key=sort_key)


@dataclass
class Blocks:
    """Tokens in packed order, cut into blocks; token pairs are (N, N), block pairs (R, R)."""

    positions: Sequence[Position]
    grid: tuple[int, int]
    block_size: int

    @classmethod
    def of(cls, layout: TokenLayout) -> Blocks:
        tokens = model_order(layout.grid, layout.num_prefix_tokens, layout.num_suffix_tokens)
        packed = [tokens[index] for index in packed_order(layout)]
        return cls(packed, layout.grid, layout.block_size)

    @cached_property
    def count(self) -> int:
        return len(range(0, len(self.positions), self.block_size))

    @cached_property
    def contents(self) -> list[list[Position]]:
        size = self.block_size
        return [list(self.positions[i * size : (i + 1) * size]) for i in range(self.count)]

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
        """Reduce (N, N) token pairs to (R, R) block pairs."""
        cuts = np.arange(0, len(self.positions), self.block_size)
        return ufunc.reduceat(ufunc.reduceat(pairs, cuts, axis=0), cuts, axis=1)

    def token_distance(self, metric: str) -> np.ndarray:
        """Return the (N, N) distances; h + w for pairs with a special token."""
        row, column = self.rows_columns
        rows, columns = abs(row[:, None] - row), abs(column[:, None] - column)
        if metric == "l1":
            distance = rows + columns
        else:
            distance = {"chebyshev": np.maximum, "axis": np.minimum}[metric](rows, columns)
        special = self.special_tokens[:, None] | self.special_tokens
        return np.where(special, sum(self.grid), distance)

    def distance(self, metric: str = "chebyshev") -> np.ndarray:
        return self.reduce(self.token_distance(metric), np.minimum)

    def any_rule(self, qualifies: np.ndarray) -> np.ndarray:
        """Return the blocks with at least one qualifying pair of tokens; special tokens qualify."""
        special = self.special_tokens[:, None] | self.special_tokens
        return self.reduce(qualifies | special, np.logical_or)

    def within(self, radius: int, metric: str = "l1") -> np.ndarray:
        return self.any_rule(self.token_distance(metric) <= radius)

    def focus(self, positions: Sequence[tuple[int, int]], radius: int) -> np.ndarray:
        """Return (N,) bool: patches within L1 `radius` of any of `positions`."""
        row, column = self.rows_columns
        near = np.zeros(len(self.positions), dtype=bool)
        for r, c in positions:
            near |= abs(row - r) + abs(column - c) <= radius
        return near & ~self.special_tokens

    def keep_special(self, mask: np.ndarray) -> np.ndarray:
        return mask | self.special[:, None] | self.special

    @cached_property
    def centroids(self) -> list[tuple[Fraction, ...] | None]:
        def mean(patches: list[Position]) -> tuple[Fraction, ...] | None:
            if not patches:
                return None
            return tuple(Fraction(sum(axis), len(patches)) for axis in zip(*patches, strict=True))

        return [mean([patch for patch in block if patch is not None]) for block in self.contents]

    def centroid_distance(self, a: int, b: int) -> Fraction | float:
        first, second = self.centroids[a], self.centroids[b]
        if first is None or second is None:
            return float("inf")
        return (first[0] - second[0]) ** 2 + (first[1] - second[1]) ** 2

    def nearest(
        self, k: int, among: Sequence[int] | None = None, metric: str = "chebyshev"
    ) -> np.ndarray:
        """Keep the k nearest of `among` for each: by distance, then centroids, then lower index."""
        among = range(self.count) if among is None else among
        distance, mask = self.distance(metric), np.zeros((self.count, self.count), dtype=bool)
        for row in among:
            ranked = sorted((distance[row, c], self.centroid_distance(row, c), c) for c in among)
            mask[row, [column for *_, column in ranked[:k]]] = True
        return mask


def kept(sparsity: float, columns: int) -> int:
    return max(1, round((1 - sparsity) * columns))


@st.composite
def layouts(draw, orders: Sequence[str] = ("raster", "tile")) -> TokenLayout:
    """Draw layouts whose tiles need not divide the grid, and whose blocks may straddle tiles."""
    return TokenLayout(
        (draw(st.integers(1, 12)), draw(st.integers(1, 17))),
        num_prefix_tokens=draw(st.integers(0, 3)),
        num_suffix_tokens=draw(st.sampled_from([0, 0, 1, 5])),
        order=draw(st.sampled_from(orders)),
        tile=(draw(st.integers(1, 5)), draw(st.integers(1, 6))),
        block_size=draw(st.integers(1, 40)),
    )

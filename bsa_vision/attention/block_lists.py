"""Convert block masks to lists of the key ranges that each row of blocks attends to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Run = tuple[int, int]  # first and one past the last key token of adjacent key blocks


class BlockRow(NamedTuple):
    """One block of queries of one head, and the keys it attends to."""

    start: int  # first query token
    stop: int
    runs: tuple[Run, ...]  # ascending, adjacent key blocks merged; empty if the row keeps nothing
    kept: int  # total number of key tokens


class KeyRanges(NamedTuple):
    """The `BlockRow`s of all heads as int32 tensors on the CPU.

    row_start   (R + 1,) first query token of each row of blocks, then the number of queries
    row_ptr     (mask images, H, R + 1) index of the first range of each row, then one past the last
    ranges      (ranges, 2) first and one past the last key token
    """

    row_start: Tensor
    row_ptr: Tensor
    ranges: Tensor


def block_rows(block_mask: Tensor, size: int, num_q: int, num_k: int) -> list[list[list[BlockRow]]]:
    """Return the rows of an (images, H, R, C) bool mask in blocks of `size`, [image][head][row]."""
    images, heads, num_rows, _ = block_mask.shape
    row_of, tokens = _merged_runs(block_mask, size, num_k)
    runs: list[list[Run]] = [[] for _ in range(images * heads * num_rows)]
    for row, (first, last) in zip(row_of.tolist(), tokens.tolist(), strict=True):
        runs[row].append((first, last))
    rows = [
        _block_row(r, runs[first_row + r], size, num_q)
        for first_row in range(0, len(runs), max(num_rows, 1))
        for r in range(num_rows)
    ]
    by_head = [rows[i * num_rows : (i + 1) * num_rows] for i in range(images * heads)]
    return [by_head[i * heads : (i + 1) * heads] for i in range(images)]


def key_ranges(block_mask: Tensor, size: int, num_q: int, num_k: int) -> KeyRanges:
    """Return the same rows as `block_rows` as tensors."""
    images, heads, num_rows, _ = block_mask.shape
    row_of, tokens = _merged_runs(block_mask, size, num_k)
    starts = torch.searchsorted(row_of, torch.arange(images * heads * num_rows + 1, device="cpu"))
    row_ptr = starts.as_strided((images, heads, num_rows + 1), (heads * num_rows, num_rows, 1))
    row_start = (torch.arange(num_rows + 1, device="cpu") * size).clamp(max=num_q)
    return KeyRanges(row_start.int(), row_ptr.int().contiguous(), tokens.int().contiguous())


def block_lists(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each row of a (..., R, C) bool mask keeps, and their indices.

    Both are int32: counts (..., R), and indices (..., R, C) with the kept blocks first, ascending.
    """
    order = (~block_mask).to(torch.uint8).argsort(dim=-1, stable=True)
    return block_mask.sum(-1, dtype=torch.int32), order.int()


def _merged_runs(block_mask: Tensor, size: int, num_k: int) -> tuple[Tensor, Tensor]:
    """Return the runs of adjacent kept blocks.

    (runs,) row index over images, heads and rows; (runs, 2) first and one past the last key token.
    """
    edges = torch.nn.functional.pad(block_mask.to(torch.int8), (1, 1)).diff(dim=-1).flatten(0, 2)
    # (images * heads * rows, C + 1): 1 where a run of kept blocks starts, -1 one past its end
    row_of, firsts = (edges == 1).nonzero().unbind(1)
    lasts = (edges == -1).nonzero()[:, 1]
    return row_of, torch.stack([firsts, lasts], 1).mul_(size).clamp_(max=num_k)


def _block_row(number: int, runs: list[Run], size: int, num_q: int) -> BlockRow:
    kept = sum(stop - start for start, stop in runs)
    return BlockRow(number * size, min((number + 1) * size, num_q), tuple(runs), kept)

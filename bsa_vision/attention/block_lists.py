"""Block masks as what there is to compute: per row of blocks, the runs of adjacent key blocks it keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Run = tuple[int, int]  # first and one past the last key token of adjacent key blocks


class BlockRow(NamedTuple):
    """One block of queries of one head, and the keys it sees."""

    start: int  # first query token
    stop: int
    runs: tuple[Run, ...]  # ascending, adjacent key blocks merged; empty when the row keeps nothing
    kept: int  # key tokens in all


class KeyRanges(NamedTuple):
    """All `BlockRow`s of all heads as int32 tensors on the CPU.

    row_start   (R + 1,) first query token of each row of blocks, and the number of queries
    row_ptr     (mask images, H, R + 1) first run of each row, and one past the last
    ranges      (ranges, 2) first and one past the last key token
    """

    row_start: Tensor
    row_ptr: Tensor
    ranges: Tensor


def block_rows(block_mask: Tensor, size: int, num_q: int, num_k: int) -> list[list[list[BlockRow]]]:
    """(images, H, R, C) bool, blocks of `size` -> [image][head][row]."""
    images, heads, num_rows, _ = block_mask.shape
    places, tokens = _merged_runs(block_mask, size, num_k)
    runs: list[list[Run]] = [[] for _ in range(images * heads * num_rows)]
    for place, (first, last) in zip(places.tolist(), tokens.tolist(), strict=True):
        runs[place].append((first, last))
    rows = [
        _block_row(r, runs[place + r], size, num_q)
        for place in range(0, len(runs), max(num_rows, 1))
        for r in range(num_rows)
    ]
    by_head = [rows[i * num_rows : (i + 1) * num_rows] for i in range(images * heads)]
    return [by_head[i * heads : (i + 1) * heads] for i in range(images)]


def key_ranges(block_mask: Tensor, size: int, num_q: int, num_k: int) -> KeyRanges:
    """The same as tensors."""
    images, heads, num_rows, _ = block_mask.shape
    places, tokens = _merged_runs(block_mask, size, num_k)
    starts = torch.searchsorted(places, torch.arange(images * heads * num_rows + 1, device="cpu"))
    run_at = starts.as_strided((images, heads, num_rows + 1), (heads * num_rows, num_rows, 1))
    bounds = (torch.arange(num_rows + 1, device="cpu") * size).clamp(max=num_q)
    return KeyRanges(bounds.int(), run_at.int().contiguous(), tokens.int().contiguous())


def block_lists(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(..., R, C) bool -> (..., R) int32 how many key blocks each row keeps, and (..., R, C) int32 which: those first, ascending."""
    order = (~block_mask).to(torch.uint8).argsort(dim=-1, stable=True)
    return block_mask.sum(-1, dtype=torch.int32), order.int()


def _merged_runs(block_mask: Tensor, size: int, num_k: int) -> tuple[Tensor, Tensor]:
    """Adjacent kept blocks merged: (runs,) index of the row, over images, heads and rows; (runs, 2) first and past the last token."""
    edges = torch.nn.functional.pad(block_mask.to(torch.int8), (1, 1)).diff(dim=-1).flatten(0, 2)
    # (images * heads * rows, C + 1): 1 where a run of kept blocks starts, -1 where it has ended
    places, firsts = (edges == 1).nonzero().unbind(1)
    lasts = (edges == -1).nonzero()[:, 1]
    return places, torch.stack([firsts, lasts], 1).mul_(size).clamp_(max=num_k)


def _block_row(number: int, runs: list[Run], size: int, num_q: int) -> BlockRow:
    kept = sum(stop - start for start, stop in runs)
    return BlockRow(number * size, min((number + 1) * size, num_q), tuple(runs), kept)

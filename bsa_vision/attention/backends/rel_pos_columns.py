"""Relative position for kernels that add no bias: as more columns of queries and keys, exactly.

    [q, rel_h / (s c), rel_w / (s c)] . [k, c onehot(row), c onehot(column)] * s = s * q . k + rel_h[row] + rel_w[column]

with c the power of two nearest above 1 / s, so that nothing grows beyond what float16 holds.

Where the grid's rows and columns beside the head dim are more than a kernel's width, its key blocks are parted into sub-grids that fit. Each
part is a call of its own, with one-hot columns that count from the part's first row and column; results are merged by log-sum-exp.
Exact in real arithmetic: each logit is the same sum. Constraint: the merge has no gradient, because the kernels' log-sum-exp has none.

A product with a one-hot column makes NaN of NaN and of infinity for every key. So terms of rows and columns that a query sees nothing of
are 0, and -inf is the lowest number there is; a query for which only that is left sees nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bsa_vision.attention.backends.problem import Problem, Result
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_tensors import DENSE

MOST_PARTS = 16  # every part reads all queries again
NOTHING = (
    -30_000
)  # log-sum-exp below which a query with terms of -inf sees nothing: float16 goes to -65504


@dataclass(frozen=True, eq=False)
class Part:
    """A sub-grid of the keys.

    rows, columns  of patches that its keys are of
    tokens         (n,) its keys, ascending; None = all
    hot            (n, rows + columns) bool, one True in each of the two
    masks          of its key blocks; None = as they are, all keys
    seen           (B or 1, H, n_q, rows + columns) bool: of which of them a query's block sees some key; None = of all
    """

    rows: slice
    columns: slice
    tokens: Tensor | None
    hot: Tensor
    masks: HeadMasks | None
    seen: Tensor | None


def why_not(problem: Problem, width: int) -> str | None:
    """Why relative position cannot be brought to a kernel whose queries and keys are at most `width` wide; None also where there is none."""
    if problem.rel_pos is None:
        return None
    dim, grid = problem.q.shape[-1], tuple(term.shape[-1] for term in problem.rel_pos)
    if not problem.scale:
        return "relative position needs a scale other than 0, by which it is divided"
    if dim + sum(grid) <= width:
        return None
    wide = f"relative position of {grid[0]} x {grid[1]} patches makes queries {dim + sum(grid)} wide, more than {width}"
    if problem.needs_gradient:
        return f"{wide}, and in parts it has no gradient"
    if problem.dropout_p or problem.return_probs or problem.is_causal:
        return f"{wide}, and in parts there is neither dropout nor causality"
    if problem.masks.kv_layout is None:
        return f"{wide}, and without a layout it cannot be parted"
    count = len(_cells(problem, width - dim))
    return (
        None
        if 0 < count <= MOST_PARTS
        else f"{wide}, and blocks in this order fit into no {MOST_PARTS} sub-grids"
    )


def attend(problem: Problem, width: int, run: Callable[[Problem], Result]) -> Result:
    """`run` on `problem` without relative position, which is in the queries and keys instead."""
    if problem.rel_pos is None:
        return run(problem)
    results = [_attend(problem, part, run) for part in _parts(problem, width)]
    if len(results) == 1:
        return results[0]
    out, lse = merge([result.out for result in results], [_lse_of(result) for result in results])
    return Result(out, lse if problem.return_lse else None)


def _attend(problem: Problem, part: Part, run: Callable[[Problem], Result]) -> Result:
    assert problem.rel_pos is not None
    rel_h, rel_w = problem.rel_pos
    terms = torch.cat(
        [rel_h[..., part.rows], rel_w[..., part.columns]], -1
    )  # (B, H, n_q, rows + columns)
    if part.seen is not None:
        terms = terms.where(part.seen, 0)
    result = run(_bring(replace(problem, return_lse=True), part, terms))
    lse = _lse_of(result)
    nothing = terms.isneginf().any(-1) & (lse < NOTHING)
    out = result.out.masked_fill(nothing[..., None], 0)
    return result._replace(out=out, lse=lse.masked_fill(nothing, torch.inf))


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to several sets of keys -> attention to all of them: (B, H, N, D) each, (B, H, N) each, +inf where nothing is seen."""
    all_lse = torch.stack(lses).float()  # (parts, B, H, N)
    all_lse = all_lse.masked_fill(all_lse.isposinf(), -torch.inf)
    lse = all_lse.logsumexp(0)
    nothing = lse.isneginf()
    weights = (all_lse - lse.masked_fill(nothing, 0)).exp()
    out = sum(weight[..., None] * out.float() for weight, out in zip(weights, outs, strict=True))
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), lse.masked_fill(nothing, torch.inf)


def _lse_of(result: Result) -> Tensor:
    assert result.lse is not None
    return result.lse


def _bring(problem: Problem, part: Part, terms: Tensor) -> Problem:
    """The part's keys, and queries that know what each of its rows and columns adds."""
    k, v = (
        x if part.tokens is None else x.index_select(2, part.tokens) for x in (problem.k, problem.v)
    )
    weight = 2.0 ** math.ceil(math.log2(1 / abs(problem.scale)))
    # Divided, so that the scale may be multiplied with the queries first.
    lowest = math.copysign(
        torch.finfo(problem.q.dtype).min / max(1, 1.01 * abs(problem.scale)), -problem.scale
    )
    columns = (terms * (1 / (problem.scale * weight))).to(problem.q.dtype)
    q = torch.cat([problem.q, columns.masked_fill(terms.isneginf(), lowest)], -1)
    k = torch.cat([k, (part.hot.to(k.dtype) * weight).expand(*k.shape[:2], -1, -1)], -1)
    masks = problem.masks if part.masks is None else part.masks
    return replace(problem, q=q, k=k, v=v, masks=masks, rel_pos=None, key_row=None, key_column=None)


# Parts


def _parts(problem: Problem, width: int) -> list[Part]:
    """Made once for these masks."""
    assert problem.rel_pos is not None
    assert problem.key_row is not None
    assert problem.key_column is not None
    (height, across), dim = (term.shape[-1] for term in problem.rel_pos), problem.q.shape[-1]
    places = problem.key_row, problem.key_column
    if dim + height + across <= width:
        whole = slice(0, height), slice(0, across)
        key = ("concat", height, across, problem.q.device, problem.is_causal)
        return problem.masks.remember(
            key, lambda: [_whole(problem, _one_hot(*places, *whole), whole)]
        )
    parted = ("concat", height, across, problem.q.device, dim, width)
    return problem.masks.remember(
        parted, lambda: [_part(problem, cell) for cell in _cells(problem, width - dim)]
    )


def _whole(problem: Problem, hot: Tensor, sides: tuple[slice, slice]) -> Part:
    kept = problem.masks.block_mask(
        problem.q.shape[2], problem.k.shape[2], causal=problem.is_causal
    )
    return Part(*sides, None, hot, None, _seen(problem, kept, hot))


def _seen(problem: Problem, kept: Tensor, hot: Tensor) -> Tensor | None:
    """Of which rows and columns, as `hot` has them, queries see some key: (B or 1, H, R, C) -> (B or 1, H, n_q, rows + columns)."""
    if problem.masks.all_dense:
        return None
    size = problem.masks.block_size
    blocks = torch.stack([own.any(0) for own in hot.cpu().split(size)])  # (C, rows + columns)
    seen = (kept.float() @ blocks.float()).bool()
    if seen.all():
        return None
    return seen.repeat_interleave(size, 2)[:, :, : problem.q.shape[2]].to(hot.device)


def _part(problem: Problem, blocks: list[int]) -> Part:
    masks, size, tokens_q, tokens_k = (
        problem.masks,
        problem.masks.block_size,
        problem.q.shape[2],
        problem.k.shape[2],
    )
    tokens = torch.cat(
        [torch.arange(b * size, min((b + 1) * size, tokens_k), device="cpu") for b in blocks]
    )
    tokens = tokens.to(problem.q.device)
    assert problem.key_row is not None
    assert problem.key_column is not None
    row, column = problem.key_row[tokens], problem.key_column[tokens]
    rows, columns = (slice(int(x.min()), int(x.max()) + 1) for x in (row, column))
    kept = masks.block_mask(tokens_q, tokens_k)[..., blocks]
    sparse = [head for head, kind in enumerate(masks.slices) if kind != DENSE]
    types = [
        0 if kind == DENSE else sparse.index(head) + 1 for head, kind in enumerate(masks.slices)
    ]
    own = HeadMasks(
        kept[:, sparse] if sparse else None, types, block_size=size, allow_empty_rows=True
    )
    hot = _one_hot(row, column, rows, columns)
    return Part(rows, columns, tokens, hot, own, _seen(problem, kept, hot))


def _one_hot(row: Tensor, column: Tensor, rows: slice, columns: slice) -> Tensor:
    counts = [torch.arange(x.start, x.stop, device=row.device) for x in (rows, columns)]
    return torch.cat([row[:, None] == counts[0], column[:, None] == counts[1]], -1)


def _cells(problem: Problem, room: int) -> list[list[int]]:
    """Key blocks by sub-grid, such that rows and columns of each are at most `room` together; as few as there are, none where no way is found."""
    layout = problem.masks.kv_layout
    assert layout is not None

    def find() -> list[list[int]]:
        # Where every head is dense, tokens are left in model order.
        row, column = (
            x[layout.inverse] if problem.masks.all_dense else x for x in layout.coordinates
        )
        return _fewest(row, column, layout.block_size, room)

    return problem.masks.remember(("cells", room), find)


def _fewest(row: Tensor, column: Tensor, size: int, room: int) -> list[list[int]]:
    """Of all grids of cells in which no block lies in two, the one with the fewest."""

    def cuts(place: Tensor) -> dict[int, Tensor]:
        """Side of the cells -> (C,) the cell of each block."""
        ends = torch.stack([torch.stack(own.aminmax()) for own in place.split(size)], 1)  # (2, C)
        cells = {side: ends // side for side in range(1, room)}
        return {side: own[0] for side, own in cells.items() if torch.equal(own[0], own[1])}

    found: list[list[int]] = []
    across = cuts(column)
    for high, above in cuts(row).items():
        for wide, beside in across.items():
            if high + wide > room:
                break
            cells = above * (int(beside.max()) + 1) + beside
            own = [(cells == cell).nonzero().flatten().tolist() for cell in cells.unique()]
            found = own if not found or len(own) < len(found) else found
    return found

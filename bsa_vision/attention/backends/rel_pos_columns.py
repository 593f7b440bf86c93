"""Relative position as extra columns of queries and keys, for kernels that add no bias.

    [q, rel_h / (s c), rel_w / (s c)] . [k, c onehot(row), c onehot(column)] * s
        = s * q . k + rel_h[row] + rel_w[column]

Here c is the smallest power of two that is at least 1 / s, so that float16 does not overflow.

If head dim, grid rows and grid columns together exceed the kernel's width, the key blocks are split
into sub-grids that fit. Each sub-grid is one call, with one-hot columns that count from its first
row and column. The results are merged by log-sum-exp. This is exact in real arithmetic, because
every logit is the same sum. Constraint: the merge has no gradient, because the kernels' log-sum-exp
has none.

NaN or infinity in one term would make the logits of all keys NaN, because it is multiplied with
one-hot columns. Therefore a term is 0 if the query attends to no key of its row or column, and -inf
is replaced by the lowest number of the dtype. A query with no other keys counts as empty.
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
# A query with terms of -inf is empty if its log-sum-exp is below this; float16 ends at -65504.
EMPTY_LSE = -30_000


@dataclass(frozen=True, eq=False)
class Part:
    """A sub-grid of the keys.

    rows, columns  patch rows and columns that its keys cover
    tokens         (n,) indices of its keys, ascending; None = all keys
    hot            (n, rows + columns) bool, one-hot over the rows and over the columns
    masks          masks of its key blocks; None = the problem's masks
    seen           (B or 1, H, n_q, rows + columns) bool: whether the query's block attends to some
                   key of the row or column; None = always
    """

    rows: slice
    columns: slice
    tokens: Tensor | None
    hot: Tensor
    masks: HeadMasks | None
    seen: Tensor | None


def why_not(problem: Problem, width: int) -> str | None:
    """Return why relative position does not fit into queries and keys of at most `width` columns.

    None if it fits, or if the problem has no relative position.
    """
    if problem.rel_pos is None:
        return None
    dim, grid = problem.q.shape[-1], tuple(term.shape[-1] for term in problem.rel_pos)
    if not problem.scale:
        return "relative position is divided by the scale, which is 0"
    needed = dim + sum(grid)
    if needed <= width:
        return None
    patches = f"{grid[0]} x {grid[1]} patches"
    wide = f"relative position of {patches} makes queries {needed} wide, more than {width}"
    if problem.needs_gradient:
        return f"{wide}, and split into sub-grids it has no gradient"
    if problem.dropout_p or problem.return_probs or problem.is_causal:
        return f"{wide}, and sub-grids support neither dropout nor causality"
    if problem.masks.kv_layout is None:
        return f"{wide}, and without a layout it cannot be split into sub-grids"
    if not 0 < len(_cells(problem, width - dim)) <= MOST_PARTS:
        return f"{wide}, and this token order needs more than {MOST_PARTS} sub-grids"
    return None


def attend(problem: Problem, width: int, run: Callable[[Problem], Result]) -> Result:
    """Call `run` on `problem`, with relative position in extra columns of queries and keys."""
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
    # (B, H, n_q, rows + columns)
    terms = torch.cat([rel_h[..., part.rows], rel_w[..., part.columns]], -1)
    if part.seen is not None:
        terms = terms.where(part.seen, 0)
    result = run(_with_columns(replace(problem, return_lse=True), part, terms))
    lse = _lse_of(result)
    empty = terms.isneginf().any(-1) & (lse < EMPTY_LSE)
    out = result.out.masked_fill(empty[..., None], 0)
    return result._replace(out=out, lse=lse.masked_fill(empty, torch.inf))


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention to several sets of keys into attention to all of them.

    outs  (B, H, N, D) each
    lses  (B, H, N) each, +inf for queries without keys
    """
    all_lse = torch.stack(lses).float()  # (parts, B, H, N)
    all_lse = all_lse.masked_fill(all_lse.isposinf(), -torch.inf)
    lse = all_lse.logsumexp(0)
    empty = lse.isneginf()
    weights = (all_lse - lse.masked_fill(empty, 0)).exp()
    out = sum(weight[..., None] * out.float() for weight, out in zip(weights, outs, strict=True))
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), lse.masked_fill(empty, torch.inf)


def _lse_of(result: Result) -> Tensor:
    assert result.lse is not None
    return result.lse


def _with_columns(problem: Problem, part: Part, terms: Tensor) -> Problem:
    """Return the problem of one part, with `terms` as columns of q and one-hot columns of k."""
    k, v, scale = problem.k, problem.v, problem.scale
    if part.tokens is not None:
        k, v = (x.index_select(2, part.tokens) for x in (k, v))
    weight = 2.0 ** math.ceil(math.log2(1 / abs(scale)))
    # Divided by the scale, because a kernel may multiply the queries with it first.
    lowest = torch.finfo(problem.q.dtype).min / max(1, 1.01 * abs(scale))
    lowest = math.copysign(lowest, -scale)
    columns = (terms * (1 / (scale * weight))).to(problem.q.dtype)
    q = torch.cat([problem.q, columns.masked_fill(terms.isneginf(), lowest)], -1)
    k = torch.cat([k, (part.hot.to(k.dtype) * weight).expand(*k.shape[:2], -1, -1)], -1)
    masks = problem.masks if part.masks is None else part.masks
    return replace(problem, q=q, k=k, v=v, masks=masks, rel_pos=None, key_row=None, key_column=None)


# Parts


def _parts(problem: Problem, width: int) -> list[Part]:
    """Return the parts, computed once for these masks."""
    assert problem.rel_pos is not None
    grid, dim = tuple(term.shape[-1] for term in problem.rel_pos), problem.q.shape[-1]
    key = ("concat", *grid, problem.q.device)
    if dim + sum(grid) <= width:
        return problem.masks.remember((*key, problem.is_causal), lambda: [_whole(problem, grid)])

    def split() -> list[Part]:
        return [_part(problem, cell) for cell in _cells(problem, width - dim)]

    return problem.masks.remember((*key, dim, width), split)


def _whole(problem: Problem, grid: tuple[int, ...]) -> Part:
    assert problem.key_row is not None
    assert problem.key_column is not None
    rows, columns = (slice(0, side) for side in grid)
    hot = _one_hot(problem.key_row, problem.key_column, rows, columns)
    tokens = (problem.q.shape[2], problem.k.shape[2])
    kept = problem.masks.block_mask(*tokens, causal=problem.is_causal)
    return Part(rows, columns, None, hot, None, _seen(problem, kept, hot))


def _seen(problem: Problem, kept: Tensor, hot: Tensor) -> Tensor | None:
    """Return `Part.seen` for a block mask `kept`, (B or 1, H, R, C)."""
    if problem.masks.all_dense:
        return None
    size = problem.masks.block_size
    blocks = torch.stack([x.any(0) for x in hot.cpu().split(size)])  # (C, rows + columns)
    seen = (kept.float() @ blocks.float()).bool()
    if seen.all():
        return None
    return seen.repeat_interleave(size, 2)[:, :, : problem.q.shape[2]].to(hot.device)


def _part(problem: Problem, blocks: list[int]) -> Part:
    masks, size = problem.masks, problem.masks.block_size
    num_q, num_k = problem.q.shape[2], problem.k.shape[2]
    ranges = [torch.arange(b * size, min((b + 1) * size, num_k), device="cpu") for b in blocks]
    tokens = torch.cat(ranges).to(problem.q.device)
    assert problem.key_row is not None
    assert problem.key_column is not None
    row, column = problem.key_row[tokens], problem.key_column[tokens]
    rows, columns = (slice(int(x.min()), int(x.max()) + 1) for x in (row, column))
    kept = masks.block_mask(num_q, num_k)[..., blocks]
    sparse = [head for head, kind in enumerate(masks.slices) if kind != DENSE]
    types = [sparse.index(head) + 1 if head in sparse else 0 for head in range(masks.num_heads)]
    base = kept[:, sparse] if sparse else None
    part_masks = HeadMasks(base, types, block_size=size, allow_empty_rows=True)
    hot = _one_hot(row, column, rows, columns)
    return Part(rows, columns, tokens, hot, part_masks, _seen(problem, kept, hot))


def _one_hot(row: Tensor, column: Tensor, rows: slice, columns: slice) -> Tensor:
    counts = [torch.arange(x.start, x.stop, device=row.device) for x in (rows, columns)]
    return torch.cat([row[:, None] == counts[0], column[:, None] == counts[1]], -1)


def _cells(problem: Problem, room: int) -> list[list[int]]:
    """Group the key blocks into as few sub-grids as possible; [] if no way is found.

    Rows and columns of a sub-grid are at most `room` together.
    """
    layout = problem.masks.kv_layout
    assert layout is not None

    def find() -> list[list[int]]:
        row, column = layout.coordinates
        if problem.masks.all_dense:  # then tokens stay in model order
            row, column = row[layout.inverse], column[layout.inverse]
        return _fewest(row, column, layout.block_size, room)

    return problem.masks.remember(("cells", room), find)


def _fewest(row: Tensor, column: Tensor, size: int, room: int) -> list[list[int]]:
    """Find the coarsest grid of cells such that every block lies within one cell."""

    def cuts(coordinate: Tensor) -> dict[int, Tensor]:
        """Side of the cells -> (C,) the cell of each block."""
        ends = torch.stack([torch.stack(x.aminmax()) for x in coordinate.split(size)], 1)  # (2, C)
        cells = {side: ends // side for side in range(1, room)}
        return {side: first for side, (first, last) in cells.items() if torch.equal(first, last)}

    fewest: list[list[int]] = []
    by_width = cuts(column)
    for height, cell_row in cuts(row).items():
        for width, cell_column in by_width.items():
            if height + width > room:
                break
            cells = cell_row * (int(cell_column.max()) + 1) + cell_column
            blocks = [(cells == cell).nonzero().flatten().tolist() for cell in cells.unique()]
            fewest = blocks if not fewest or len(blocks) < len(fewest) else fewest
    return fewest

"""Block-sparse attention that reads only the kept key blocks, one block of queries at a time.

This is the torch implementation, forward and gradient. On x86-64 CPUs, calls in float32, bfloat16
and float16 run in the compiled loop instead (`cpu_kernel`). Keys of a row of blocks are used in
place if they are adjacent, and gathered otherwise. Nothing is N x N: the working memory per thread
is one block of queries by the keys it keeps. Low precision is computed in float32.

Constraint: works on whole blocks, so exact (token) streaming is not supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_vision.attention.backends.problem import Problem, Result, Span, all_finite
from bsa_vision.attention.backends.workers import run_tasks, scratch
from bsa_vision.attention.block_lists import BlockRow, Run
from bsa_vision.attention.mask_tensors import DENSE

TASKS_PER_THREAD = 4  # rows of blocks differ in cost; several tasks per thread balance the load


def why_not(problem: Problem) -> str | None:
    """Return why `gather` cannot run `problem`; None if it can."""
    if problem.exact_streaming:
        return "exact streaming is decided per token, 'gather' skips whole blocks"
    if problem.return_probs:
        return "the dropout mask is N x N, which 'gather' never builds"
    return None


class Gradients(NamedTuple):
    """Gradients of the tensors of a `Problem`, each shaped like its tensor.

    rel_h and rel_w are None if the problem has no relative position.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rel_h: Tensor | None
    rel_w: Tensor | None


def run(problem: Problem) -> Result:
    """Compute `problem`."""
    out = problem.empty_out()
    lse = problem.empty_lse() if problem.return_lse else None
    sparse = _dense_heads(problem, out) if _can_hand_over(problem) else range(problem.num_heads)
    heads = list(_heads(problem, sparse, _by_query(problem)))
    chunks = -(-TASKS_PER_THREAD * torch.get_num_threads() // max(len(heads), 1))
    tasks = []
    for head in heads:
        step = max(1, -(-len(head.rows) // chunks))
        tasks += [
            partial(_rows, problem, head, head.rows[i : i + step], out, lse)
            for i in range(0, len(head.rows), step)
        ]
    run_tasks(tasks, problem.q.device)
    return Result(out, lse)


def _can_hand_over(problem: Problem) -> bool:
    """Return whether torch's own attention can compute the dense heads.

    It supports no relative position and returns no log-sum-exp.
    """
    plain = (
        problem.rel_pos is None
        and not problem.is_causal
        and not problem.dropout_p
        and not problem.return_lse
    )
    if not plain or DENSE not in problem.masks.slices:
        return False
    # In low precision it turns infinite logits into 0. Checking values would synchronise a GPU.
    return problem.q.device.type != "cpu" or all_finite(problem.q, problem.k, problem.v)


def _dense_heads(problem: Problem, out: Tensor) -> list[int]:
    """Compute the dense heads with torch's attention; return the other heads."""
    dense = [head for head, kind in enumerate(problem.masks.slices) if kind == DENSE]
    adjacent = len(dense) == dense[-1] + 1 - dense[0]
    heads: slice | list[int] = slice(dense[0], dense[-1] + 1) if adjacent else dense
    for span in problem.spans():
        q = problem.q[span.row, :, span.q][heads]
        k, v = (x[span.row, :, span.k] for x in (problem.k, problem.v))
        if problem.group > 1:
            k, v = (x[[head // problem.group for head in dense]] for x in (k, v))
        else:
            k, v = k[heads], v[heads]
        result = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=problem.scale)
        out[span.row, :, span.q][heads] = result[0]
    return [head for head in range(problem.num_heads) if head not in dense]


def _rows(
    problem: Problem, head: _Head, rows: list[BlockRow], out: Tensor, lse: Tensor | None
) -> None:
    """Compute consecutive `rows` of one head."""
    chunk = slice(rows[0].start, rows[-1].stop)
    queries = head.q[chunk] * problem.scale
    to = out[head.span.row, head.number, head.span.q][chunk]
    results = to if to.dtype == queries.dtype else queries.new_empty(to.shape)
    chunk_lse = queries.new_full((len(queries),), torch.inf)
    # Split once in advance: slicing in the loop would cost as much as some of its small products.
    sizes = [row.stop - row.start for row in rows]
    split = (x.split(sizes) for x in (queries, results, chunk_lse))
    parts = zip(_with_keys(head, rows), *split, strict=True)
    for (row, keys, values), row_queries, result, row_lse in parts:
        if not row.runs:
            result.zero_()
            continue
        logits = _logits(problem, head, row, row_queries, keys)
        if lse is not None:
            row_lse.copy_(logits.logsumexp(-1))
            row_lse.masked_fill_(row_lse.isneginf(), torch.inf)
        probs, empty = _softmax_(logits)
        if problem.dropout_p:
            probs *= _dropout(problem, head, row, probs)
        torch.mm(probs, values, out=result)
        if empty is not None:
            result.masked_fill_(empty, 0)
    if results is not to:
        to.copy_(results)
    if lse is not None:
        lse[head.span.image, head.number, chunk] = chunk_lse


def gradients(problem: Problem, out: Tensor, grad_out: Tensor) -> Gradients:
    """Return the gradients at `grad_out`, given the output; recomputes every softmax."""
    dtype = problem.compute_dtype
    inputs = (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in inputs]
    heads = list(_heads(problem, range(problem.num_heads), _by_query(problem, out, grad_out)))
    # One task per group: its query heads accumulate into the same keys, and no two tasks may write
    # to the same memory.
    tasks = [
        partial(_head_gradients, problem, heads[i : i + problem.group], out, grad_out, grads)
        for i in range(0, len(heads), problem.group)
    ]
    run_tasks(tasks, problem.q.device)
    q, k, v, *rel = (grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))
    return Gradients(q, k, v, *(rel or (None, None)))


def _head_gradients(
    problem: Problem, heads: list[_Head], out: Tensor, grad_out: Tensor, grads: list[Tensor]
) -> None:
    """Add the gradients of the query heads of one group to `grads`."""
    for head in heads:
        at_q = (head.span.row, head.number, head.span.q)
        at_k = (head.span.row, head.number // problem.group, head.span.k)
        queries = head.q * problem.scale
        head_out, head_grad = (x[at_q].to(queries.dtype) for x in (out, grad_out))
        delta = (head_grad * head_out).sum(-1, keepdim=True)  # (n_q, 1)
        grad_q, *grad_rel = (grads[i][at_q] for i in (0, *range(3, len(grads))))
        grad_k, grad_v = grads[1][at_k], grads[2][at_k]
        for row, keys, values in _with_keys(head, head.rows):
            if not row.runs:
                continue
            block = slice(row.start, row.stop)
            row_queries, row_grad = queries[block], head_grad[block]
            probs, empty = _softmax_(_logits(problem, head, row, row_queries, keys))
            grad_probs = scratch("grad_probs", tuple(probs.shape), probs.dtype, probs.device)
            torch.mm(row_grad, values.T, out=grad_probs)
            if empty is not None:  # so that no gradient is 0 times infinity
                row_queries, row_grad = (x.masked_fill(empty, 0) for x in (row_queries, row_grad))
            if problem.dropout_p:
                dropout = _dropout(problem, head, row, probs)
                grad_probs *= dropout
                _add(grad_v, row, (probs * dropout).T @ row_grad)
            else:
                _add(grad_v, row, probs.T @ row_grad)
            grad_logits = probs.mul_(grad_probs.sub_(delta[block]))
            if empty is not None:
                grad_logits.masked_fill_(empty, 0)
            torch.mm(grad_logits, keys, out=grad_q[block]).mul_(problem.scale)
            if empty is not None:
                grad_q[block].masked_fill_(empty, 0)
            _add(grad_k, row, grad_logits.T @ row_queries)
            by_run = _by_run(row, grad_logits, dim=1)
            for grad, coordinate in zip(grad_rel, (problem.key_row, problem.key_column)):
                assert coordinate is not None
                for (start, stop), part in zip(row.runs, by_run, strict=True):
                    grad[block].index_add_(1, coordinate[start:stop], part)


class _Head(NamedTuple):
    """One head of one image, with its tensors in float32 or float64."""

    span: Span
    number: int
    blocks: list[BlockRow]  # its rows of blocks
    rows: list[BlockRow]  # what to compute: `blocks`, or their queries one by one
    q: Tensor  # (n_q, D)
    k: Tensor  # (n_k, D)
    v: Tensor  # (n_k, Dv)


def _by_query(problem: Problem, *results: Tensor) -> bool:
    """Return whether each query must be computed separately, with its own keys only.

    It must if causality cuts blocks that may hold NaN or infinity.
    """
    inputs = (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))
    return problem.is_causal and not all_finite(*inputs, *results)


def _queries(row: BlockRow, offset: int) -> Iterator[BlockRow]:
    """Yield the queries of a row one by one, with the keys that causality permits."""
    for query in range(row.start, row.stop):
        end = query + offset + 1
        runs = tuple((start, min(stop, end)) for start, stop in row.runs if start < end)
        yield BlockRow(query, query + 1, runs, sum(stop - start for start, stop in runs))


def _heads(problem: Problem, heads: range | list[int], by_query: bool) -> Iterator[_Head]:
    q, k, v = (x.to(problem.compute_dtype) for x in (problem.q, problem.k, problem.v))
    for span in problem.spans():
        num_q, num_k = span.q.stop - span.q.start, span.k.stop - span.k.start
        images = problem.masks.block_rows(num_q, num_k, causal=problem.is_causal)
        by_head = images[problem.mask_image(span.image)]
        for number in heads:
            at_k = (span.row, number // problem.group, span.k)
            tensors = (q[span.row, number, span.q], k[at_k], v[at_k])
            blocks = rows = by_head[number]
            if by_query:
                rows = [query for row in blocks for query in _queries(row, num_k - num_q)]
            yield _Head(span, number, blocks, rows, *tensors)


def _with_keys(head: _Head, rows: list[BlockRow]) -> Iterator[tuple[BlockRow, Tensor, Tensor]]:
    """Yield each row with its keys and values.

    They are views if the row keeps one run. Otherwise they are gathered, once for consecutive rows
    with the same runs.
    """
    largest = max((row.kept for row in rows), default=0)
    keys, values = (
        scratch(name, (largest, x.shape[1]), x.dtype, x.device)
        for name, x in (("keys", head.k), ("values", head.v))
    )
    gathered: tuple[Run, ...] | None = None
    k, v = head.k[:0], head.v[:0]
    for row in rows:
        if row.runs != gathered:
            gathered = row.runs
            if len(row.runs) == 1:
                start, stop = row.runs[0]
                k, v = head.k[start:stop], head.v[start:stop]
            elif row.runs:
                to = (keys[: row.kept], values[: row.kept])
                k, v = (
                    torch.cat([x[i:j] for i, j in row.runs], out=y)
                    for x, y in zip((head.k, head.v), to)
                )
        yield row, k, v


def _add(x: Tensor, row: BlockRow, values: Tensor) -> None:
    """Add `values` to the keys of `x` that `row` keeps."""
    for (start, stop), part in zip(row.runs, _by_run(row, values), strict=True):
        x[start:stop] += part


def _by_run(row: BlockRow, x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """Split `x` along `dim` into one view per run of the keys that `row` keeps."""
    return x.split([stop - start for start, stop in row.runs], dim)


def _logits(problem: Problem, head: _Head, row: BlockRow, queries: Tensor, keys: Tensor) -> Tensor:
    """Compute (n, kept keys) logits of scaled queries, causality applied, in scratch memory."""
    out = scratch("logits", (queries.shape[0], keys.shape[0]), queries.dtype, queries.device)
    logits = torch.mm(queries, keys.T, out=out)
    if problem.rel_pos is not None:
        by_run = _by_run(row, logits, dim=1)
        coordinates = (problem.key_row, problem.key_column)
        for term, coordinate in zip(problem.rel_pos, coordinates, strict=True):
            assert coordinate is not None
            of_head = term[head.span.row, head.number, head.span.q]
            products = of_head[row.start : row.stop].to(logits.dtype)
            for (start, stop), part in zip(row.runs, by_run, strict=True):
                part += products.index_select(1, coordinate[start:stop])
    if problem.is_causal:
        offset = head.k.shape[0] - head.q.shape[0]  # bottom-right aligned
        ranges = [torch.arange(start, stop, device=logits.device) for start, stop in row.runs]
        key = torch.cat(ranges)
        query = torch.arange(row.start, row.stop, device=logits.device)[:, None] + offset
        logits.masked_fill_(key > query, -torch.inf)
    return logits


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the softmax, in place, and an (n, 1) bool mask of empty queries.

    The logits of an empty query are all -inf; its softmax is 0. The mask is None if no query is
    empty; only CPUs check this, other devices would have to synchronise.
    """
    empty = logits.amax(-1, keepdim=True).isneginf()
    probs = torch.softmax(logits, -1, out=logits)
    if logits.device.type == "cpu" and not empty.any():
        return probs, None
    return probs.masked_fill_(empty, 0), empty


def _dropout(problem: Problem, head: _Head, row: BlockRow, probs: Tensor) -> Tensor:
    """Return the factors that dropout multiplies `probs` with: 0 or 1 / (1 - p)."""
    block = head.blocks[row.start // problem.masks.block_size]
    shape = (block.stop - block.start, block.kept)
    keep = problem.keep(shape, head.span.image, head.number, block.start)
    queries = slice(row.start - block.start, row.stop - block.start)
    keep = keep[queries, : row.kept]  # causality keeps the first keys of a block
    return keep.to(probs.dtype).div_(1 - problem.dropout_p)

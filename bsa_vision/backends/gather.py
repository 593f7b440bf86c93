"""Only the kept key blocks are read and computed, one block of queries at a time; gradients likewise.

Keys are used where they lie when a row keeps one run of adjacent blocks, and gathered otherwise. Nothing is N x N: working
memory is one block of queries by the keys it keeps, per thread. Low precision is computed in float32.
Constraints: block granularity, so exact (token) streaming is not served.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_vision.backends.problem import Problem, Result, Span
from bsa_vision.backends.workers import run_tasks, scratch
from bsa_vision.head_masks import DENSE, BlockRow

TASKS_PER_THREAD = 4  # rows of blocks cost unequal amounts; several tasks a thread even that out


def why_not(problem: Problem) -> str | None:
    if problem.exact_streaming:
        return "exact streaming is decided per token, 'gather' skips whole blocks"
    if problem.return_probs:
        return "the dropout mask is N x N, which 'gather' never builds"
    return None


class Gradients(NamedTuple):
    """Gradients of the tensors of a `Problem`, each shaped like its tensor; None where there is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    rel_h: Tensor | None
    rel_w: Tensor | None


def run(problem: Problem) -> Result:
    out = problem.empty_out()
    lse = problem.empty_lse() if problem.return_lse else None
    sparse = _dense_heads(problem, out) if _can_hand_over(problem) else range(problem.num_heads)
    heads = list(_heads(problem, sparse))
    chunks = -(-TASKS_PER_THREAD * torch.get_num_threads() // max(len(heads), 1))
    tasks = []
    for head in heads:
        step = max(1, -(-len(head.rows) // chunks))
        tasks += [
            partial(_rows, problem, head, head.rows[i : i + step], out, lse) for i in range(0, len(head.rows), step)
        ]
    run_tasks(tasks, problem.q.device)
    return Result(out, lse)


def _can_hand_over(problem: Problem) -> bool:
    """Whether torch's own attention can take the dense heads: it knows no relative position and returns no LSE."""
    plain = problem.rel_pos is None and not problem.is_causal and not problem.dropout_p and not problem.return_lse
    return plain and DENSE in problem.masks.slices


def _dense_heads(problem: Problem, out: Tensor) -> list[int]:
    """Compute the dense heads with torch's attention; returns the heads that are left."""
    dense = [head for head, kind in enumerate(problem.masks.slices) if kind == DENSE]
    heads: slice | list[int] = slice(dense[0], dense[-1] + 1) if len(dense) == dense[-1] + 1 - dense[0] else dense
    for span in problem.spans():
        q = problem.q[span.row, :, span.q][heads]
        k, v = (x[span.row, :, span.k] for x in (problem.k, problem.v))
        if problem.group > 1:
            k, v = (x[[head // problem.group for head in dense]] for x in (k, v))
        else:
            k, v = k[heads], v[heads]
        out[span.row, :, span.q][heads] = F.scaled_dot_product_attention(
            q[None], k[None], v[None], scale=problem.scale
        )[0]
    return [head for head in range(problem.num_heads) if head not in dense]


def _rows(problem: Problem, head: _Head, rows: list[BlockRow], out: Tensor, lse: Tensor | None) -> None:
    image_out = out[head.span.row, head.number, head.span.q]
    for row, keys, values in _with_keys(head, rows):
        target = image_out[row.start : row.stop]
        if not row.runs:
            target.zero_()
            continue
        logits = _logits(problem, head, row, keys)
        if lse is not None:
            row_lse = logits.logsumexp(-1)
            lse[head.span.image, head.number, row.start : row.stop] = row_lse.masked_fill(row_lse.isneginf(), torch.inf)
        probs = _softmax_(problem, logits)
        if problem.dropout_p:
            probs *= _dropout(problem, head, row, probs)
        if target.dtype == probs.dtype:
            torch.mm(probs, values, out=target)
        else:
            target.copy_(probs @ values)


def gradients(problem: Problem, out: Tensor, grad_out: Tensor) -> Gradients:
    """The gradients at `grad_out`, given the output; every block of the softmax is computed again."""
    dtype = problem.compute_dtype
    inputs = (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in inputs]
    heads = list(_heads(problem, range(problem.num_heads)))
    # Query heads of one group add to the same keys, so a group is one task: no two tasks write to the same place.
    tasks = [
        partial(_head_gradients, problem, heads[i : i + problem.group], out, grad_out, grads)
        for i in range(0, len(heads), problem.group)
    ]
    run_tasks(tasks, problem.q.device)
    q, k, v, *rel = (grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))
    return Gradients(q, k, v, *(rel or (None, None)))


def _head_gradients(problem: Problem, heads: list[_Head], out: Tensor, grad_out: Tensor, grads: list[Tensor]) -> None:
    dtype = problem.compute_dtype
    for head in heads:
        at_q = (head.span.row, head.number, head.span.q)
        at_k = (head.span.row, head.number // problem.group, head.span.k)
        grad_q, grad_k, grad_v = grads[0][at_q], grads[1][at_k], grads[2][at_k]
        image_grad = grad_out[at_q].to(dtype)
        delta = (image_grad * out[at_q].to(dtype)).sum(-1, keepdim=True)  # (n_q, 1)
        for row, keys, values in _with_keys(head, head.rows):
            if not row.runs:
                continue
            rows = slice(row.start, row.stop)
            probs = _softmax_(problem, _logits(problem, head, row, keys))
            grad_probs = torch.mm(image_grad[rows], values.T, out=_block("grad_probs", probs))
            if problem.dropout_p:
                dropout = _dropout(problem, head, row, probs)
                grad_probs *= dropout
                _add(grad_v, row, (probs * dropout).T @ image_grad[rows])
            else:
                _add(grad_v, row, probs.T @ image_grad[rows])
            grad_logits = probs.mul_(grad_probs.sub_(delta[rows]))
            grad_q[rows] = (grad_logits @ keys).mul_(problem.scale)
            _add(grad_k, row, (grad_logits.T @ head.q[rows]).mul_(problem.scale))
            for grad, key_place in zip(grads[3:], (problem.key_row, problem.key_column)):
                assert key_place is not None
                grad[at_q][rows].index_add_(1, _take(key_place, row), grad_logits)


class _Head(NamedTuple):
    """One head of one image: float32 or float64 tensors of its own tokens, and its rows of blocks."""

    span: Span
    number: int
    rows: list[BlockRow]
    q: Tensor  # (n_q, D)
    k: Tensor  # (n_k, D)
    v: Tensor  # (n_k, Dv)


def _heads(problem: Problem, heads: range | list[int]) -> Iterator[_Head]:
    q, k, v = (x.to(problem.compute_dtype) for x in (problem.q, problem.k, problem.v))
    for span in problem.spans():
        num_q, num_k = span.q.stop - span.q.start, span.k.stop - span.k.start
        rows = problem.masks.block_rows(num_q, num_k, causal=problem.is_causal)[problem.mask_image(span.image)]
        for index in heads:
            at_k = (span.row, index // problem.group, span.k)
            yield _Head(span, index, rows[index], q[span.row, index, span.q], k[at_k], v[at_k])


def _with_keys(head: _Head, rows: list[BlockRow]) -> Iterator[tuple[BlockRow, Tensor, Tensor]]:
    """Each row with the keys and values it keeps; gathered once for neighbours that keep the same."""
    gathered: tuple[tuple[int, int], ...] | None = None
    keys, values = head.k[:0], head.v[:0]
    for row in rows:
        if row.runs != gathered:
            keys, values = _take(head.k, row, "keys"), _take(head.v, row, "values")
            gathered = row.runs
        yield row, keys, values


def _take(x: Tensor, row: BlockRow, name: str | None = None) -> Tensor:
    """The keys of `x` (n_k, ...) that `row` keeps: a view when they are one run, else a copy, in scratch when named."""
    if len(row.runs) <= 1:
        start, stop = row.runs[0] if row.runs else (0, 0)
        return x[start:stop]
    parts = [x[start:stop] for start, stop in row.runs]
    if name is None:
        return torch.cat(parts)
    kept = sum(stop - start for start, stop in row.runs)
    return torch.cat(parts, out=scratch(name, (kept, *x.shape[1:]), x.dtype, x.device))


def _add(x: Tensor, row: BlockRow, values: Tensor) -> None:
    """Add `values` to the keys of `x` that `row` keeps; the transpose of `_take`."""
    for (start, stop), part in zip(row.runs, values.split([stop - start for start, stop in row.runs]), strict=True):
        x[start:stop] += part


def _block(name: str, like: Tensor) -> Tensor:
    return scratch(name, tuple(like.shape), like.dtype, like.device)


def _logits(problem: Problem, head: _Head, row: BlockRow, keys: Tensor) -> Tensor:
    """(n, kept keys) logits of one block of queries, causality applied; in scratch memory."""
    rows = slice(row.start, row.stop)
    q = head.q[rows] * problem.scale
    logits = torch.mm(q, keys.T, out=scratch("logits", (q.shape[0], keys.shape[0]), q.dtype, q.device))
    if problem.rel_pos is not None:
        for term, key_place in zip(problem.rel_pos, (problem.key_row, problem.key_column), strict=True):
            assert key_place is not None
            products = term[head.span.row, head.number, head.span.q][rows].to(logits.dtype)
            logits += products.index_select(1, _take(key_place, row))
    if problem.is_causal:
        offset = head.k.shape[0] - head.q.shape[0]  # bottom-right aligned
        key = torch.cat([torch.arange(start, stop, device=logits.device) for start, stop in row.runs])
        query = torch.arange(row.start, row.stop, device=logits.device)[:, None] + offset
        logits.masked_fill_(key > query, -torch.inf)
    return logits


def _softmax_(problem: Problem, logits: Tensor) -> Tensor:
    torch.softmax(logits, -1, out=logits)
    # Causal: single queries of a block that is kept may see nothing, and softmax of nothing is NaN.
    return logits.nan_to_num_(nan=0.0) if problem.is_causal else logits


def _dropout(problem: Problem, head: _Head, row: BlockRow, probs: Tensor) -> Tensor:
    keep = problem.keep(tuple(probs.shape), head.span.image, head.number, row.start)
    return keep.to(probs.dtype).div_(1 - problem.dropout_p)

"""Only the kept key blocks are read and computed, one block of queries at a time; gradients likewise.

Keys are used where they lie when a row keeps one run of adjacent blocks, and gathered otherwise. Nothing is N x N:
working memory is one block of queries by the keys it keeps. Low precision inputs are accumulated in float32.
Constraints: block granularity, so exact (token) streaming is not served.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bsa_vision.backends.problem import Problem, Result, Span
from bsa_vision.head_masks import BlockRow


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
    out, lse = problem.empty_out(), problem.empty_lse()
    for head in _heads(problem):
        image_out, image_lse = out[head.span.row, head.index, head.span.q], lse[head.span.image, head.index]
        for row in head.rows:
            if not row.runs:
                image_out[row.start : row.stop] = 0
                continue
            logits = _logits(problem, head, row)
            row_lse = logits.logsumexp(-1, keepdim=True)  # (n, 1)
            empty = row_lse.isneginf()  # causal: whole queries of a kept block may see nothing
            probs = logits.sub_(row_lse.masked_fill(empty, 0)).exp_()
            if problem.dropout_p:
                probs *= _dropout(problem, head, row, probs)
            image_out[row.start : row.stop] = probs @ take(head.v, row)
            image_lse[row.start : row.stop] = row_lse.masked_fill(empty, torch.inf)[:, 0]
    return Result(out, lse)


def gradients(problem: Problem, lse: Tensor | None, out: Tensor, grad_out: Tensor) -> Gradients:
    """The gradients at `grad_out`, from the outputs of any backend; softmax rows are computed again from `lse`."""
    if lse is None:
        out, lse, _ = run(problem)
        assert lse is not None
    dtype = problem.compute_dtype
    terms = problem.rel_pos or ()
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (problem.q, problem.k, problem.v, *terms)]
    grad_q, grad_k, grad_v, *grad_rel = grads
    for head in _heads(problem):
        at_q, at_k = (head.span.row, head.index, head.span.q), (head.span.row, head.index // problem.group, head.span.k)
        image_lse, image_grad = lse[head.span.image, head.index].to(dtype), grad_out[at_q].to(dtype)
        delta = (image_grad * out[at_q].to(dtype)).sum(-1, keepdim=True)  # (n_q, 1)
        for row in head.rows:
            if not row.runs:
                continue
            rows = slice(row.start, row.stop)
            probs = (_logits(problem, head, row) - image_lse[rows, None]).exp_()
            keys, values = take(head.k, row), take(head.v, row)
            grad_probs = image_grad[rows] @ values.T
            if problem.dropout_p:
                dropout = _dropout(problem, head, row, probs)
                grad_probs *= dropout
                _add(grad_v[at_k], row, (probs * dropout).T @ image_grad[rows])
            else:
                _add(grad_v[at_k], row, probs.T @ image_grad[rows])
            grad_logits = probs.mul_(grad_probs.sub_(delta[rows]))
            grad_q[at_q][rows] = (grad_logits @ keys).mul_(problem.scale)
            _add(grad_k[at_k], row, (grad_logits.T @ head.q[rows]).mul_(problem.scale))
            for grad, key_place in zip(grad_rel, (problem.key_row, problem.key_column)):
                assert key_place is not None
                grad[at_q][rows].index_add_(1, take(key_place, row), grad_logits)
    q, k, v, *rel = (grad.to(x.dtype) for grad, x in zip(grads, (problem.q, problem.k, problem.v, *terms), strict=True))
    return Gradients(q, k, v, *(rel or (None, None)))


class _Head(NamedTuple):
    """One head of one image: float32 or float64 tensors of its own tokens, and its rows of blocks."""

    span: Span
    index: int
    rows: list[BlockRow]
    q: Tensor  # (n_q, D)
    k: Tensor  # (n_k, D)
    v: Tensor  # (n_k, Dv)


def _heads(problem: Problem) -> Iterator[_Head]:
    dtype = problem.compute_dtype
    for span in problem.spans():
        num_q, num_k = span.q.stop - span.q.start, span.k.stop - span.k.start
        rows = problem.masks.block_rows(num_q, num_k, causal=problem.is_causal)[problem.mask_image(span.image)]
        for index in range(problem.num_heads):
            q, k, v = problem.q[span.row, index, span.q], problem.k, problem.v
            k, v = (x[span.row, index // problem.group, span.k] for x in (k, v))
            yield _Head(span, index, rows[index], q.to(dtype), k.to(dtype), v.to(dtype))


def take(x: Tensor, row: BlockRow) -> Tensor:
    """The keys of `x` (n_k, ...) that `row` keeps: a view when they are one run, a copy otherwise."""
    if len(row.runs) == 1:
        start, stop = row.runs[0]
        return x[start:stop]
    return torch.cat([x[start:stop] for start, stop in row.runs])


def _add(x: Tensor, row: BlockRow, values: Tensor) -> None:
    """Add `values` to the keys of `x` that `row` keeps; undoes `take`."""
    for (start, stop), part in zip(row.runs, values.split([stop - start for start, stop in row.runs]), strict=True):
        x[start:stop] += part


def _logits(problem: Problem, head: _Head, row: BlockRow) -> Tensor:
    """(n, kept keys) logits of one block of queries, causality applied."""
    rows = slice(row.start, row.stop)
    logits = (head.q[rows] * problem.scale) @ take(head.k, row).T
    if problem.rel_pos is not None:
        assert problem.key_row is not None and problem.key_column is not None
        for term, key_place in zip(problem.rel_pos, (problem.key_row, problem.key_column), strict=True):
            products = term[head.span.row, head.index, head.span.q][rows].to(logits.dtype)
            logits += products.index_select(1, take(key_place, row))
    if problem.is_causal:
        device, offset = logits.device, head.k.shape[0] - head.q.shape[0]  # bottom-right aligned
        key = torch.cat([torch.arange(start, stop, device=device) for start, stop in row.runs])
        query = torch.arange(row.start, row.stop, device=device)[:, None] + offset
        logits.masked_fill_(key > query, -torch.inf)
    return logits


def _dropout(problem: Problem, head: _Head, row: BlockRow, probs: Tensor) -> Tensor:
    keep = problem.keep(tuple(probs.shape), head.span.image, head.index, row.start)
    return keep.to(probs.dtype).div_(1 - problem.dropout_p)

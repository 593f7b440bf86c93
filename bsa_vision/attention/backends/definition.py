"""Attention as it is defined: each query with the keys it sees and with nothing else, in plain arithmetic.

Keys that a query does not see are left out, not multiplied by 0, which would make NaN of NaN and of infinity. A query that
sees nothing, because there is no key for it or because its logits are all -inf, gives 0 and log-sum-exp +inf, and takes
part in no gradient. Everything else is as the arithmetic of floating point has it: NaN that is seen is NaN.
Computed in float32 or float64, with torch operations: gradients of any order, in both modes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_vision.attention.backends.problem import Problem, Result, Span, all_finite

AT_ONCE = 2**22  # numbers in the keys and values that are gathered at a time


class Queries(NamedTuple):
    """What is given for each query, as (H, groups, g, ...): the g queries of a group follow each other."""

    q: Tensor  # (H, groups, g, D), scaled; 0 where a query sees nothing
    nothing: Tensor  # (H, groups, g, 1) bool: a query sees nothing
    sees: Tensor  # (H, groups, g, n_k) bool
    bias: Tensor | None  # (H, groups, g, n_k)
    keep: Tensor | None  # (H, groups, g, n_k) bool: what dropout keeps


def attend(problem: Problem, span: Span) -> Result:
    """One image: out (H, n_q, Dv), lse (H, n_q) and, where asked for, probs (H, n_q, n_k)."""
    dtype, bias, mask = problem.compute_dtype, None, problem.token_mask(span)
    q = problem.scale * problem.q[span.row, :, span.q].to(dtype)  # (H, n_q, D)
    k, v = (
        x[span.row, :, span.k].to(dtype).repeat_interleave(problem.group, 0)
        for x in (problem.k, problem.v)
    )
    (heads, num_q, _), num_k = q.shape, k.shape[1]
    if problem.rel_pos is not None:
        rel_h, rel_w = (term[span.row, :, span.q].to(dtype) for term in problem.rel_pos)
        bias = rel_h[:, :, problem.key_row] + rel_w[:, :, problem.key_column]
    keep = problem.keep((heads, num_q, num_k), span.image) if problem.dropout_p else None
    sees = (
        torch.ones(heads, num_q, num_k, dtype=torch.bool, device=q.device) if mask is None else mask
    )
    with torch.no_grad():
        logits = q @ k.mT if bias is None else q @ k.mT + bias
        nothing = logits.masked_fill(~sees, -torch.inf).isneginf().all(-1, keepdim=True)

    group = _together(problem, mask, *(x for x in (q, k, v, bias) if x is not None))
    groups = max(-(-num_q // group), 1)

    def grouped(x: Tensor | None, fill: int = 0) -> Tensor | None:
        """(H, n_q, ...) -> (H, groups, g, ...)"""
        return (
            None
            if x is None
            else F.pad(x, (0, 0, 0, groups * group - num_q), value=fill).unflatten(1, (-1, group))
        )

    # What sees nothing is constant from here on: no gradient of it is 0 times infinity.
    every = (
        grouped(q.masked_fill(nothing, 0)),
        grouped(nothing, 1),
        grouped(sees),
        grouped(bias),
        grouped(keep),
    )
    step = max(1, AT_ONCE // max(heads * num_k * (k.shape[-1] + v.shape[-1]), 1))
    parts = []
    for start in range(0, groups, step):
        some: Any = (None if x is None else x[:, start : start + step] for x in every)
        parts.append(_part(problem, Queries(*some), k, v))
    return Result(*(torch.cat(x, 1).flatten(1, 2)[:, :num_q] for x in zip(*parts)))


def _together(problem: Problem, mask: Tensor | None, *tensors: Tensor) -> int:
    """How many queries are computed together: all, a block or, where those of a block see different keys, one."""
    if mask is None or all_finite(*tensors):  # finite numbers may be multiplied by 0
        return max(problem.max_seqlen_q, 1)
    return 1 if problem.is_causal else problem.masks.block_size


def _part(problem: Problem, queries: Queries, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Out (H, groups, g, Dv), lse (H, groups, g) and, where asked for, probs (H, groups, g, n_k)."""
    q, nothing, sees, bias, keep = queries
    by_any = sees.any(2)  # (H, groups, n_k)
    most = by_any.shape[-1]
    if by_any.numel() and not by_any.is_meta:  # which holds no values
        most = int(by_any.sum(-1).max())
    keys = by_any.byte().argsort(dim=-1, descending=True, stable=True)[
        ..., :most
    ]  # and others, where a group sees fewer
    k, v = (
        torch.take_along_dim(x[:, None], keys[..., None], 2).masked_fill(
            ~by_any.gather(-1, keys)[..., None], 0
        )
        for x in (k, v)
    )  # (H, groups, most, D)
    keys = keys[:, :, None].expand(*q.shape[:3], -1)
    seen = sees.gather(-1, keys)  # (H, groups, g, most)
    logits = q @ k.mT if bias is None else q @ k.mT + bias.gather(-1, keys)
    logits = logits.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0)
    probs = weights = logits.softmax(-1)
    lse = logits.logsumexp(-1).masked_fill(nothing[..., 0], torch.inf)
    if keep is not None:
        keep = keep.gather(-1, keys)
        weights, probs = probs * keep / (1 - problem.dropout_p), torch.where(keep, probs, -probs)
    out = (weights @ v).masked_fill(nothing, 0)
    if not problem.return_probs:
        return out, lse
    return out, lse, probs.new_zeros(sees.shape).scatter(-1, keys, probs.masked_fill(nothing, 0))

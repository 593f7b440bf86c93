"""The definition of block-sparse attention, in plain arithmetic.

Masked keys are left out instead of being multiplied by 0, which would turn NaN and infinity into
NaN. A query without keys, or whose logits are all -inf, is empty: its output is 0, its log-sum-exp
is +inf, and it contributes to no gradient. Otherwise floating point rules apply: NaN in an unmasked
key gives NaN.

Computed in float32 or float64 with torch operations, so gradients of any order exist, in forward
and reverse mode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_vision.attention.backends.problem import Problem, Result, Span, all_finite

AT_ONCE = 2**22  # elements of keys and values that are gathered at a time


class Queries(NamedTuple):
    """The inputs per query; each group consists of g consecutive queries."""

    q: Tensor  # (H, groups, g, D), scaled; 0 for empty queries
    empty: Tensor  # (H, groups, g, 1) bool
    mask: Tensor  # (H, groups, g, n_k) bool, True = attend
    bias: Tensor | None  # (H, groups, g, n_k)
    keep: Tensor | None  # (H, groups, g, n_k) bool, True = not dropped


def attend(problem: Problem, span: Span) -> Result:
    """Compute one image: out (H, n_q, Dv), lse (H, n_q) and, if needed, probs (H, n_q, n_k)."""
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
    group = _group_size(problem, mask, *(x for x in (q, k, v, bias) if x is not None))
    groups = max(-(-num_q // group), 1)
    if mask is None:
        mask = torch.ones(heads, num_q, num_k, dtype=torch.bool, device=q.device)
    with torch.no_grad():
        logits = q @ k.mT if bias is None else q @ k.mT + bias
        empty = logits.masked_fill(~mask, -torch.inf).isneginf().all(-1, keepdim=True)

    def grouped(x: Tensor | None, fill: int = 0) -> Tensor | None:
        """(H, n_q, ...) -> (H, groups, g, ...)"""
        if x is None:
            return None
        return F.pad(x, (0, 0, 0, groups * group - num_q), value=fill).unflatten(1, (-1, group))

    q = q.masked_fill(empty, 0)  # a constant, so that no gradient is 0 times infinity
    queries = (grouped(q), grouped(empty, 1), grouped(mask), grouped(bias), grouped(keep))
    step = max(1, AT_ONCE // max(heads * num_k * (k.shape[-1] + v.shape[-1]), 1))
    parts = []
    for start in range(0, groups, step):
        some: Any = (None if x is None else x[:, start : start + step] for x in queries)
        parts.append(_part(problem, Queries(*some), k, v))
    return Result(*(torch.cat(x, 1).flatten(1, 2)[:, :num_q] for x in zip(*parts)))


def _group_size(problem: Problem, mask: Tensor | None, *tensors: Tensor) -> int:
    """Return how many queries are computed together.

    All if every tensor is finite, because then masked keys may be multiplied by 0. Otherwise one
    block, or one query if causality gives the queries of a block different keys.
    """
    if mask is None or all_finite(*tensors):
        return max(problem.max_seqlen_q, 1)
    return 1 if problem.is_causal else problem.masks.block_size


def _part(problem: Problem, queries: Queries, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Compute some of the groups: (out, lse) and, if needed, probs.

    out (H, groups, g, Dv), lse (H, groups, g), probs (H, groups, g, n_k)
    """
    q, empty, mask, bias, keep = queries
    used = mask.any(2)  # (H, groups, n_k): keys that some query of the group attends to
    most = used.shape[-1]
    if used.numel() and not used.is_meta:  # meta tensors hold no values
        most = int(used.sum(-1).max())
    # Groups with fewer keys are filled up with unused ones.
    keys = used.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
    unused = ~used.gather(-1, keys)[..., None]
    k, v = (
        torch.take_along_dim(x[:, None], keys[..., None], 2).masked_fill(unused, 0) for x in (k, v)
    )  # (H, groups, most, D)
    keys = keys[:, :, None].expand(*q.shape[:3], -1)  # (H, groups, g, most)
    logits = q @ k.mT if bias is None else q @ k.mT + bias.gather(-1, keys)
    logits = logits.masked_fill(~mask.gather(-1, keys), -torch.inf).masked_fill(empty, 0)
    probs = weights = logits.softmax(-1)
    lse = logits.logsumexp(-1).masked_fill(empty[..., 0], torch.inf)
    if keep is not None:
        keep = keep.gather(-1, keys)
        weights, probs = probs * keep / (1 - problem.dropout_p), torch.where(keep, probs, -probs)
    out = (weights @ v).masked_fill(empty, 0)
    if not problem.return_probs:
        return out, lse
    return out, lse, probs.new_zeros(mask.shape).scatter(-1, keys, probs.masked_fill(empty, 0))

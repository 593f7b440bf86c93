"""torch's scaled_dot_product_attention with the block mask spelled out per token: nothing is skipped.

Constraints: no log-sum-exp, no dropout mask; with a mask or relative position it builds (H, N, N) per image.
For calls in which every head is dense it hands q, k, v over as they are, and torch picks its fastest kernel.
Where NaN or infinity is about, which torch would carry from what is masked to what is not, the definition computes instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bsa_vision.attention.backends import definition
from bsa_vision.attention.backends.problem import Problem, Result, Span, all_finite


def why_not(problem: Problem) -> str | None:
    if problem.return_lse:
        return "scaled_dot_product_attention returns no log-sum-exp"
    if problem.return_probs:
        return "scaled_dot_product_attention returns no dropout mask"
    return None


def run(problem: Problem) -> Result:
    whole = (
        problem.masks.all_dense
        and not problem.ragged
        and problem.rel_pos is None
        and not problem.is_causal
    )
    # With nothing masked, a GPU is not waited for only to ask for values.
    finite = (whole and problem.q.is_cuda) or all_finite(
        problem.q, problem.k, problem.v, *(problem.rel_pos or ())
    )
    if whole and finite:
        every = _sdpa(problem, problem.q, problem.k, problem.v, None)
        if problem.q.is_cuda or all_finite(every):
            return Result(every)
    out = problem.empty_out()
    for span in problem.spans():
        result = _masked(problem, span) if finite else None
        if result is None or not all_finite(result):
            result = definition.attend(problem, span).out.to(out.dtype)
        out[span.row, :, span.q] = result
    return Result(out)


def _masked(problem: Problem, span: Span) -> torch.Tensor:
    """One image, (H, n_q, Dv)."""
    tensors = zip((problem.q, problem.k, problem.v), (span.q, span.k, span.k))
    q, k, v = (x[span.row, :, tokens][None] for x, tokens in tensors)
    mask = problem.token_mask(span)
    result = _sdpa(problem, q, k, v, _bias(problem, span, mask))[0]
    # torch leaves rows that see nothing undefined
    return result if mask is None else result.masked_fill(~mask.any(-1, keepdim=True), 0)


def _bias(problem: Problem, span: Span, mask: torch.Tensor | None) -> torch.Tensor | None:
    if problem.rel_pos is None:
        return mask
    rel_h, rel_w = (term[span.row, :, span.q] for term in problem.rel_pos)
    bias = rel_h[:, :, problem.key_row] + rel_w[:, :, problem.key_column]  # (H, n_q, n_k)
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def _sdpa(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    if problem.group > 1:
        k, v = (x.repeat_interleave(problem.group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=problem.dropout_p, scale=problem.scale
    )

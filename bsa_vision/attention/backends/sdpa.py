"""torch's scaled_dot_product_attention with the block mask expanded to tokens; skips nothing.

If every head is dense, q, k and v are passed on unchanged, and torch picks its fastest kernel.
Calls with NaN or infinity are computed by `definition`, because torch would carry them from masked
keys into the result.

Constraints: no log-sum-exp, no dropout mask. With a mask or relative position it builds (H, N, N)
per image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bsa_vision.attention.backends import definition
from bsa_vision.attention.backends.problem import Problem, Result, Span, all_finite


def why_not(problem: Problem) -> str | None:
    """Return why torch's attention cannot run `problem`; None if it can."""
    if problem.return_lse:
        return "scaled_dot_product_attention returns no log-sum-exp"
    if problem.return_probs:
        return "scaled_dot_product_attention returns no dropout mask"
    return None


def run(problem: Problem) -> Result:
    """Compute `problem`."""
    masks, on_gpu = problem.masks, problem.q.is_cuda
    plain = masks.all_dense and not (problem.ragged or problem.rel_pos or problem.is_causal)
    # Without a mask, values need no check, which would synchronise a GPU.
    inputs = (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))
    finite = (plain and on_gpu) or all_finite(*inputs)
    if plain and finite:
        result = _sdpa(problem, problem.q, problem.k, problem.v, None)
        if on_gpu or all_finite(result):
            return Result(result)
    out = problem.empty_out()
    for span in problem.spans():
        image = _masked(problem, span) if finite else None
        if image is None or not all_finite(image):
            image = definition.attend(problem, span).out.to(out.dtype)
        out[span.row, :, span.q] = image
    return Result(out)


def _masked(problem: Problem, span: Span) -> torch.Tensor:
    """Compute one image, (H, n_q, Dv)."""
    tensors = zip((problem.q, problem.k, problem.v), (span.q, span.k, span.k))
    q, k, v = (x[span.row, :, tokens][None] for x, tokens in tensors)
    mask = problem.token_mask(span)
    result = _sdpa(problem, q, k, v, _bias(problem, span, mask))[0]
    # torch leaves rows without keys undefined.
    return result if mask is None else result.masked_fill(~mask.any(-1, keepdim=True), 0)


def _bias(problem: Problem, span: Span, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the mask of one image, with relative position as a float (H, n_q, n_k) bias."""
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

"""The definition: dense arithmetic with the mask applied, float32 or float64, differentiated by torch.

Every other backend is tested against this one. It builds everything N x N and is meant to be read, not to be fast.
"""

from __future__ import annotations

import torch

from bsa_vision.backends.problem import Problem, Result, Span


def why_not(problem: Problem) -> str | None:
    return None


def run(problem: Problem) -> Result:
    out, lse = problem.empty_out(), problem.empty_lse()
    size = problem.masks.block_size
    rounded = (-(-problem.longest_q // size) * size, -(-problem.longest_k // size) * size)
    probs = out.new_zeros(problem.num_images, problem.num_heads, *rounded) if problem.return_probs else None
    for span in problem.spans():
        image_out, image_lse, image_probs = _attend(problem, span)
        out[span.row, :, span.q] = image_out
        lse[span.image, :, : image_lse.shape[1]] = image_lse
        if probs is not None:
            probs[span.image, :, : image_probs.shape[1], : image_probs.shape[2]] = image_probs
    return Result(out, lse, probs)


def _attend(problem: Problem, span: Span) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = problem.compute_dtype
    q = problem.q[span.row, :, span.q].to(dtype)  # (H, n_q, D)
    k, v = (x[span.row, :, span.k].to(dtype).repeat_interleave(problem.group, 0) for x in (problem.k, problem.v))
    logits = problem.scale * q @ k.transpose(1, 2)  # (H, n_q, n_k)
    if problem.rel_pos is not None:
        rel_h, rel_w = (term[span.row, :, span.q].to(dtype) for term in problem.rel_pos)
        logits = logits + rel_h[:, :, problem.key_row] + rel_w[:, :, problem.key_column]
    mask = problem.token_mask(span)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    sees_nothing = torch.isneginf(logits).all(-1)  # (H, n_q); also where there is no key at all
    lse = logits.masked_fill(sees_nothing[..., None], 0).logsumexp(-1).masked_fill(sees_nothing, torch.inf)
    probs = (logits - lse[..., None]).exp()  # rows that see nothing: exp(-inf) = 0
    if problem.dropout_p:
        keep = problem.keep(tuple(probs.shape), span.image)
        return (probs * keep / (1 - problem.dropout_p)) @ v, lse, torch.where(keep, probs, -probs)
    return probs @ v, lse, probs

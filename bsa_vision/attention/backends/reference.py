"""The definition (`definition.attend`), image by image: what every other backend is tested against.

It is meant to be read, not to be fast.
"""

from __future__ import annotations

from bsa_vision.attention.backends import definition
from bsa_vision.attention.backends.problem import Problem, Result


def why_not(problem: Problem) -> str | None:
    return None


def run(problem: Problem) -> Result:
    out, lse = problem.empty_out(), problem.empty_lse()
    size = problem.masks.block_size
    rounded = (-(-problem.max_seqlen_q // size) * size, -(-problem.max_seqlen_k // size) * size)
    probs = (
        out.new_zeros(problem.num_images, problem.num_heads, *rounded)
        if problem.return_probs
        else None
    )
    for span in problem.spans():
        image = definition.attend(problem, span)
        assert image.lse is not None
        out[span.row, :, span.q] = image.out
        lse[span.image, :, : image.lse.shape[1]] = image.lse
        if probs is not None and image.probs is not None:
            probs[span.image, :, : image.probs.shape[1], : image.probs.shape[2]] = image.probs
    return Result(out, lse, probs)

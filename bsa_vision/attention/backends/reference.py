"""The reference implementation: `definition.attend`, image by image.

Every other backend is tested against it. It is written to be read, not to be fast.
"""

from __future__ import annotations

from bsa_vision.attention.backends import definition
from bsa_vision.attention.backends.problem import Problem, Result


def why_not(problem: Problem) -> str | None:
    """Return None: the reference runs every call."""
    return None


def run(problem: Problem) -> Result:
    """Compute `problem`."""
    out, lse, probs = problem.empty_out(), problem.empty_lse(), None
    if problem.return_probs:
        size, tokens = problem.masks.block_size, (problem.max_seqlen_q, problem.max_seqlen_k)
        rounded = (-(-count // size) * size for count in tokens)
        probs = out.new_zeros(problem.num_images, problem.num_heads, *rounded)
    for span in problem.spans():
        image = definition.attend(problem, span)
        assert image.lse is not None
        out[span.row, :, span.q] = image.out
        lse[span.image, :, : image.lse.shape[1]] = image.lse
        if probs is not None and image.probs is not None:
            probs[span.image, :, : image.probs.shape[1], : image.probs.shape[2]] = image.probs
    return Result(out, lse, probs)

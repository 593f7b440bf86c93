"""Backends for GPUs prove themselves before they are taken: a small call, or its gradient, against the definition.

They depend on packages, compilers and hardware that no test of ours can have seen. One that is off, or breaks, on this machine is not used:
never a silently different result. Once per process, device, dtype and kind of call (head dims, grid of relative position, gradients): each compiles
kernels of its own, which may fit a GPU or not. Compiling takes the time it takes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from bsa_vision.attention.backends.problem import Backend, Problem
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.masks import TokenLayout, random_blocks, stack_heads

TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float32: 0.02}  # of values of about 1
GRID = (
    14,
    20,
)  # 280 tokens: the last block is shorter; at most, where relative position has a grid of its own


@dataclass(frozen=True)
class CallKind:
    """Of calls that are proved together."""

    dtype: torch.dtype
    device: torch.device
    dims: tuple[int, int]  # of queries and keys, of values
    grid: tuple[int, ...] | None  # of relative position
    gradient: bool

    @classmethod
    def of(cls, problem: Problem) -> CallKind:
        q, v, terms = problem.q, problem.v, problem.rel_pos
        grid = None if terms is None else tuple(term.shape[-1] for term in terms)
        return cls(q.dtype, q.device, (q.shape[-1], v.shape[-1]), grid, problem.needs_gradient)


@lru_cache(maxsize=256)
def failure(backend: Backend, reference: Backend, kind: CallKind) -> str | None:
    """What is wrong with this backend here; None = its results are right."""
    # In a thread of its own: whatever the caller is in (autocast, inference mode, an operator, another default device), this is not.
    # Not an executor: that takes no work once the main thread has ended.
    found: list[str | None] = []
    thread = Thread(target=lambda: found.append(_try(backend, reference, kind)), daemon=True)
    try:
        thread.start()
    except RuntimeError:  # Python starts no more threads, because it ends
        return _try(backend, reference, kind)
    thread.join()
    return found[0]


def _try(backend: Backend, reference: Backend, kind: CallKind) -> str | None:
    problem = _problem(kind)
    try:
        with torch.cuda.device(kind.device) if kind.device.type == "cuda" else nullcontext():
            if backend.why_not(problem) is not None:
                return None  # it serves other calls than this one
            results = (_results(own, problem, kind.gradient) for own in (backend, reference))
            off = {name: _off(*pair) for name, *pair in zip(NAMES, *results, strict=False)}
    except Exception as error:  # what a package runs into on this machine is anything
        return (
            f"a small call with it failed here: {type(error).__name__}: {str(error).strip()[:200]}"
        )
    wrong = [f"{name} by {x:.2g}" for name, x in off.items() if not x <= TOLERANCE[kind.dtype]]
    return (
        f"a small call with it gave wrong results here: off is {', '.join(wrong)}"
        if wrong
        else None
    )


NAMES = ("output", "dq", "dk", "dv", "drel_h", "drel_w")


def _results(backend: Any, problem: Problem, gradient: bool) -> tuple[Tensor, ...]:
    out = backend.run(problem).out
    if not gradient:
        return (out,)
    leaves = (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))
    return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))


def _problem(kind: CallKind) -> Problem:
    """One dense head, two that skip; logits of standard deviation 1 and more. Of a large grid the keys fill a corner."""
    generator = torch.Generator("cpu").manual_seed(0)
    height, width = GRID if kind.grid is None else map(min, GRID, kind.grid)
    layout, dim = TokenLayout((height, width)), kind.dims[0]

    def random(width: int) -> Tensor:
        made = torch.randn(2, 3, layout.num_tokens, width, generator=generator, device="cpu")
        return made.to(kind.device, kind.dtype).requires_grad_(kind.gradient)

    base = stack_heads([random_blocks(layout, 0.5, seed=0, stream=head) for head in range(2)], 1)
    masks = HeadMasks(base, [0, 1, 1], layout=layout)
    problem = Problem(random(dim), random(dim), random(kind.dims[1]), masks, dim**-0.5)
    if kind.grid is None:
        return problem
    row, column = (place.to(kind.device) for place in layout.coordinates)
    return replace(problem, rel_pos=RelPos(*map(random, kind.grid)), key_row=row, key_column=column)


def _off(found: Tensor, expected: Tensor) -> float:
    """Largest difference, over the largest value where that is more than 1."""
    return float(
        (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1)
    )

"""Self-tests of the GPU backends, on this machine and before their first use.

GPU backends depend on packages, compilers and hardware that the test suite cannot cover. Each one
therefore computes a small call, and its gradient if needed, and compares it with the reference. A
backend that fails or returns wrong results is not used on this machine.

There is one test per process, device, dtype, head dims, grid of relative position and gradient,
because each combination compiles other kernels, which may not fit every GPU. The first test may be
slow because kernels are compiled.
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
GRID = (14, 20)  # largest grid; its 280 tokens end in a shorter block


@dataclass(frozen=True)
class CallKind:
    """Properties shared by all calls that one self-test covers."""

    dtype: torch.dtype
    device: torch.device
    dims: tuple[int, int]  # head dims of q and k, and of v
    grid: tuple[int, ...] | None  # of relative position
    gradient: bool

    @classmethod
    def of(cls, problem: Problem) -> CallKind:
        """Return the kind of `problem`."""
        q, v, terms = problem.q, problem.v, problem.rel_pos
        grid = None if terms is None else tuple(term.shape[-1] for term in terms)
        return cls(q.dtype, q.device, (q.shape[-1], v.shape[-1]), grid, problem.needs_gradient)


@lru_cache(maxsize=256)
def failure(backend: Backend, reference: Backend, kind: CallKind) -> str | None:
    """Run the self-test of a backend; return its failure, or None if the results are right."""
    # In a new thread, which does not inherit the caller's autocast, inference mode, operator or
    # default device. Not in an executor, which rejects work once the main thread has ended.
    found: list[str | None] = []
    thread = Thread(target=lambda: found.append(_test(backend, reference, kind)), daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is shutting down and starts no more threads
        return _test(backend, reference, kind)
    thread.join()
    return found[0]


def _test(backend: Backend, reference: Backend, kind: CallKind) -> str | None:
    failed, problem = "it failed its self-test on this machine", _problem(kind)
    try:
        with torch.cuda.device(kind.device) if kind.device.type == "cuda" else nullcontext():
            if backend.why_not(problem) is not None:
                return None  # this small call is unsupported, others may not be
            results = (_results(x, problem, kind.gradient) for x in (backend, reference))
            errors = {name: _error(*pair) for name, *pair in zip(NAMES, *results, strict=False)}
    except Exception as error:  # packages may raise anything
        return f"{failed}: {type(error).__name__}: {str(error).strip()[:200]}"
    tolerance = TOLERANCE[kind.dtype]
    wrong = [f"{name} differs by {x:.2g}" for name, x in errors.items() if not x <= tolerance]
    return f"{failed}: {', '.join(wrong)}" if wrong else None


NAMES = ("output", "dq", "dk", "dv", "drel_h", "drel_w")


def _results(backend: Any, problem: Problem, gradient: bool) -> tuple[Tensor, ...]:
    out = backend.run(problem).out
    if not gradient:
        return (out,)
    leaves = (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))
    return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))


def _problem(kind: CallKind) -> Problem:
    """Build the small call: one dense head and two sparse ones, on at most `GRID` patches.

    Logits have a standard deviation of at least 1. The terms of relative position cover the whole
    grid of the call, also if the keys fill only a corner of it.
    """
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
    row, column = (x.to(kind.device) for x in layout.coordinates)
    return replace(problem, rel_pos=RelPos(*map(random, kind.grid)), key_row=row, key_column=column)


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value if that is above 1."""
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))

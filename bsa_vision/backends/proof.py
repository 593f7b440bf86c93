"""Backends for GPUs prove themselves before they are taken: a small call, forward and gradient, against the definition.

They depend on packages, compilers and hardware that no test of ours can have seen. One that is off, or breaks, on this machine is not used:
never a silently different result. Once per process, device, dtype and kind of call; compiling takes the time it takes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bsa_vision.backends.problem import Problem
from bsa_vision.head_masks import HeadMasks
from bsa_vision.rel_pos import RelPos
from masks import TokenLayout, random_blocks, stack_heads

TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float32: 0.02}  # of values of about 1
LAYOUT = TokenLayout((14, 20))  # 280 tokens: the last block is shorter
DIM = 64


@lru_cache(maxsize=64)
def objection(
    backend: ModuleType, reference: ModuleType, dtype: torch.dtype, device: torch.device, with_rel_pos: bool
) -> str | None:
    """What is wrong with this backend here; None = its results are right."""
    # In a thread of its own: whatever the caller is in (autocast, inference mode, an operator, another default device), this is not.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try, backend, reference, dtype, device, with_rel_pos).result()


def _try(
    backend: ModuleType, reference: ModuleType, dtype: torch.dtype, device: torch.device, with_rel_pos: bool
) -> str | None:
    problem = _problem(dtype, device, with_rel_pos)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            with torch.no_grad():
                if backend.why_not(problem) is None:
                    pairs = {"output": (backend.run(problem).out, reference.run(problem).out)}
                else:
                    pairs = {}  # it serves other calls than this one
            asked = _with_leaves(problem)
            if backend.why_not(asked) is None:
                pairs |= dict(zip(("dq", "dk", "dv"), zip(_gradients(backend, asked), _gradients(reference, asked))))
            off = {name: _off(*pair) for name, pair in pairs.items()}
    except Exception as error:  # what a package runs into on this machine is anything
        return f"a small call with it failed here: {type(error).__name__}: {str(error).strip()[:200]}"
    wrong = [f"{name} by {x:.2g}" for name, x in off.items() if not x <= TOLERANCE[dtype]]
    return f"a small call with it gave wrong results here: off is {', '.join(wrong)}" if wrong else None


def _problem(dtype: torch.dtype, device: torch.device, with_rel_pos: bool) -> Problem:
    """One dense head, two that skip; logits of standard deviation 1 and more."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(width: int) -> Tensor:
        return torch.randn(2, 3, LAYOUT.num_tokens, width, generator=generator, device="cpu").to(device, dtype)

    base = stack_heads([random_blocks(LAYOUT, 0.5, seed=0, stream=head) for head in range(2)], 1)
    masks = HeadMasks(base, [0, 1, 1], layout=LAYOUT)
    problem = Problem(random(DIM), random(DIM), random(DIM), masks, DIM**-0.5)
    if not with_rel_pos:
        return problem
    row, column = (place.to(device) for place in LAYOUT.coordinates)
    return replace(problem, rel_pos=RelPos(*map(random, LAYOUT.grid)), key_row=row, key_column=column)


def _with_leaves(problem: Problem) -> Problem:
    return replace(problem, **{name: getattr(problem, name).detach().requires_grad_() for name in ("q", "k", "v")})


def _gradients(backend: Any, problem: Problem) -> tuple[Tensor, ...]:
    out = backend.run(problem).out
    return torch.autograd.grad(out, (problem.q, problem.k, problem.v), torch.ones_like(out))


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max())

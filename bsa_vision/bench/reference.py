"""Compare results with the `reference` backend in float64.

The error of a tensor is the largest norm of the difference between a token's vector and the
expected one, relative to the root mean square norm of the expected vectors. The allowed error is
measured: it is a multiple of the error of plain attention (matmul, mask, softmax, matmul) in the
dtype of the case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.bench.case import DTYPES, Case, Inputs

ALLOWANCE = 3.0
ALLOWANCE_LOW = 1.5  # float16, bfloat16: plain attention rounds its logits, fused kernels do not
# Added, in units of the accumulating dtype's eps: fused kernels recompute the softmax from its
# log-sum-exp, whose rounding error grows with the logits (10 to 20).
ROUNDINGS = 64.0
ONE_HEAD = 2**26  # most logits per head: 8192 tokens, several tensors of 0.5 GB in float64
ALL_HEADS = 2**28  # most logits to check, such as 16 heads of 4096 tokens; beyond it, fewer heads
NAMES = ("out", "dq", "dk", "dv", "drel_h", "drel_w")


@dataclass(frozen=True)
class Error:
    """The error of one tensor and the allowed error; see `distance`."""

    found: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.found <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return f"{self.found:.0e} / {self.allowed:.0e}"


class Reference:
    """The expected results of the checked heads of one case, in packed order."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.heads = inputs.packed, checked_heads(inputs.case)
        dtype = DTYPES[inputs.case.dtype]
        self.dense = self._compute(_definition, torch.float64, dense=True)
        self.sparse = self._compute(_definition, torch.float64)
        plain = zip(self._compute(_plain, dtype), self.sparse, strict=True)
        self.allowed = [allowed(distance(rounded, exact), dtype) for rounded, exact in plain]

    @property
    def checked(self) -> str:
        """Which part of the results is compared, for reports."""
        case = self.inputs.case
        if not self.heads:
            return f"NOTHING, {case.tokens:,} tokens are too many"
        if len(self.heads) == case.heads:
            return "all heads"
        return f"{len(self.heads)} of {case.heads} heads"

    def errors(self, results: Sequence[Tensor], dense: bool) -> dict[str, Error]:
        """Return the errors of `results`, (B, H, N, ...) in packed order.

        dense  compare with dense attention without relative position
        """
        expected, heads = self.dense if dense else self.sparse, list(self.heads)
        parts = zip(NAMES, results, expected, self.allowed, strict=False)
        return {name: Error(distance(x[:, heads], y), limit) for name, x, y, limit in parts}

    def _compute(
        self, attend: Callable[[Problem], Any], dtype: torch.dtype, dense: bool = False
    ) -> list[Tensor]:
        """Compute results and gradients head by head, (B, checked heads, N, ...) each."""
        inputs, tokens = self.inputs, self.inputs.case.tokens
        blocks = inputs.masks.block_mask(tokens, tokens)  # (1, H, R, C)
        blocks = torch.ones_like(blocks) if dense else blocks
        found = []
        for head in self.heads:
            one = slice(head, head + 1)
            leaves = [x[:, one].detach().to(dtype, copy=True) for x in inputs.tensors]
            leaves = leaves[:3] if dense else leaves
            for x in leaves:
                x.requires_grad_(inputs.grad is not None)
            masks = HeadMasks(blocks[:, one], block_size=inputs.case.block_size)
            out = attend(inputs.problem(leaves, masks))
            found.append([out.detach()])
            if inputs.grad is not None:
                found[-1] += torch.autograd.grad(out, leaves, inputs.grad[:, one].to(dtype))
        return [torch.cat(heads, 1) for heads in zip(*found, strict=True)]


def checked_heads(case: Case) -> tuple[int, ...]:
    """Return the heads to check, sparse ones first: all, some or none."""
    logits = case.batch * case.tokens**2
    return tuple(range(case.heads))[-max(1, ALL_HEADS // logits) :] if logits <= ONE_HEAD else ()


def allowed(plain: float, dtype: torch.dtype) -> float:
    """Return the allowed error if plain attention in `dtype` has the error `plain`."""
    accumulating = torch.promote_types(dtype, torch.float32)
    factor = ALLOWANCE if dtype == accumulating else ALLOWANCE_LOW
    return factor * plain + ROUNDINGS * torch.finfo(accumulating).eps


def distance(result: Tensor, expected: Tensor) -> float:
    """Return the largest error of a token, relative to the RMS norm; NaN stays NaN."""
    norm = expected.double().norm(dim=-1)
    difference = (result.double() - expected.double()).norm(dim=-1)
    return float(difference.max() / norm.square().mean().sqrt())


def _definition(problem: Problem) -> Any:
    return BACKENDS["reference"].run(problem).out


def _plain(problem: Problem) -> Any:
    logits = problem.scale * problem.q @ problem.k.transpose(2, 3)
    if problem.rel_pos is not None:
        rel_h, rel_w = problem.rel_pos
        logits = logits + rel_h[..., problem.key_row] + rel_w[..., problem.key_column]
    tokens, size = logits.shape[-1], problem.masks.block_size
    blocks = problem.masks.block_mask(tokens, tokens).to(logits.device)
    mask = blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :tokens, :tokens]
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ problem.v

"""Compare results with the definition: the `reference` backend in float64.

An error is that of the worst token: the length of the difference between its vector and the
expected one, over the root mean square length of such vectors. How large rounding errors may be is
measured: plain attention (matmul, mask, softmax, matmul) in the case's own dtype is compared with
float64 as well, and an implementation may be a few times as far off.
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
# On top, in roundings of the accumulating dtype: fused kernels rebuild a softmax from its
# logarithm, whose own rounding error is as large as a logit of 10 to 20 makes it.
ROUNDINGS = 64.0
ONE_HEAD = 2**26  # logits of one head that fit: 8192 tokens, 0.5 GB in float64, several times
ALL_HEADS = 2**28  # logits that are checked: all of 16 heads of 4096 tokens, then fewer heads
NAMES = ("out", "dq", "dk", "dv", "drel_h", "drel_w")


@dataclass(frozen=True)
class Error:
    """How far one tensor is off, and how far it may be; see `distance`."""

    found: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.found <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return f"{self.found:.0e} / {self.allowed:.0e}"


class Reference:
    """The expected results of one case, in packed order, of the heads that are checked."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.heads = inputs.packed, checked_heads(inputs.case)
        dtype = DTYPES[inputs.case.dtype]
        self.dense = self._compute(_definition, torch.float64, dense=True)
        self.sparse = self._compute(_definition, torch.float64)
        plain = zip(self._compute(_plain, dtype), self.sparse, strict=True)
        self.allowed = [allowed(distance(one, exact), dtype) for one, exact in plain]

    @property
    def checked(self) -> str:
        """Which part of the results is compared, in words."""
        case = self.inputs.case
        if not self.heads:
            return f"NOTHING, {case.tokens:,} tokens are too many"
        some = f"{len(self.heads)} of {case.heads} heads"
        return "all heads" if len(self.heads) == case.heads else some

    def errors(self, results: Sequence[Tensor], dense: bool) -> dict[str, Error]:
        """Return the error of each of `results`, (B, H, N, ...) in packed order.

        dense  compare with attention without masks and relative position
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
            own = slice(head, head + 1)
            leaves = [x[:, own].detach().to(dtype, copy=True) for x in inputs.tensors]
            leaves = leaves[:3] if dense else leaves
            for x in leaves:
                x.requires_grad_(inputs.grad is not None)
            masks = HeadMasks(blocks[:, own], block_size=inputs.case.block_size)
            out = attend(inputs.problem(leaves, masks))
            found.append([out.detach()])
            if inputs.grad is not None:
                found[-1] += torch.autograd.grad(out, leaves, inputs.grad[:, own].to(dtype))
        return [torch.cat(heads, 1) for heads in zip(*found, strict=True)]


def checked_heads(case: Case) -> tuple[int, ...]:
    """Choose the heads that are checked, sparse ones first: all, some, or none."""
    logits = case.batch * case.tokens**2
    return tuple(range(case.heads))[-max(1, ALL_HEADS // logits) :] if logits <= ONE_HEAD else ()


def allowed(plain: float, dtype: torch.dtype) -> float:
    """Return the allowed error where plain attention in `dtype` is off by `plain`."""
    accumulating = torch.promote_types(dtype, torch.float32)
    factor = ALLOWANCE if dtype == accumulating else ALLOWANCE_LOW
    return factor * plain + ROUNDINGS * torch.finfo(accumulating).eps


def distance(result: Tensor, expected: Tensor) -> float:
    """Return the worst token's error over the typical length of a vector; NaN stays NaN."""
    length = expected.double().norm(dim=-1)
    difference = (result.double() - expected.double()).norm(dim=-1)
    return float(difference.max() / length.square().mean().sqrt())


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

"""Describe an attention call to benchmark as plain data, and make its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.rel_pos import RelPos, decompose
from bsa_vision.masks import Pattern, TokenLayout

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
# Standard deviation of the queries, and thus of the logits. With nearly uniform attention a wrong
# mask would go unnoticed.
QUERY_STD = 2.0


@dataclass(frozen=True)
class Case:
    """One attention call to benchmark with several implementations.

    grid         (h, w) patches; there are no prefix tokens, so N = h * w
    pattern      block mask of the sparse heads; random patterns differ between heads
    dense_heads  number of leading heads to keep dense
    dtype        a name in `DTYPES`
    rel_pos      add factored relative position
    backward     also compute the gradients of all inputs
    backend      backend of bsa-vision
    """

    grid: tuple[int, int]
    pattern: Pattern
    heads: int = 12
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    batch: int = 1
    dense_heads: int = 0
    order: str = "tile"
    block_size: int = 128
    rel_pos: bool = False
    backward: bool = False
    backend: str = "auto"
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, order=self.order, block_size=self.block_size)


def make_masks(case: Case) -> HeadMasks:
    """Build the masks.

    Raises ValueError if the pattern does not fit the grid or leaves a row empty.
    """
    if case.dense_heads > case.heads:
        raise ValueError(f"--dense-heads {case.dense_heads}: there are {case.heads} heads.")
    types, layout = [int(head >= case.dense_heads) for head in range(case.heads)], case.layout
    if not any(types):
        return HeadMasks(None, types, layout=layout)
    sparse = [case.pattern(layout, stream=head) for head in range(case.dense_heads, case.heads)]
    return HeadMasks(torch.stack(sparse)[None], types, layout=layout)  # (1, sparse heads, R, C)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The masks and tensors, the same for every implementation.

    tensors    q, k, v (B, H, N, D), and with relative position rel_h, rel_w (B, H, N, h or w)
    grad       gradient of the output; None without backward
    is_packed  whether tokens are in packed order instead of model order
    """

    case: Case
    masks: HeadMasks
    tensors: tuple[Tensor, ...]
    grad: Tensor | None
    is_packed: bool = False

    @property
    def q(self) -> Tensor:
        return self.tensors[0]

    @cached_property
    def packed(self) -> Inputs:
        """The same inputs in packed order, for implementations that do not order tokens."""
        if self.is_packed:
            return self
        tensors, grad = self.pack(self.tensors), self.grad
        grad = None if grad is None else self.pack([grad])[0]
        return Inputs(self.case, self.masks, tensors, grad, is_packed=True)

    def pack(self, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Reorder tensors from the token order of these inputs to packed order."""
        if self.is_packed or self.case.layout.is_identity:
            return tuple(tensors)
        index = self.case.layout.permutation.to(self.q.device)
        return tuple(x.index_select(2, index) for x in tensors)

    def problem(self, tensors: Sequence[Tensor], masks: HeadMasks | None = None) -> Problem:
        """Return the call with other tensors, such as those of some heads.

        masks  None = the masks of all heads
        """
        q, k, v, *terms = tensors
        row, column = (x.to(q.device) for x in self.case.layout.coordinates)
        problem = Problem(q, k, v, masks or self.masks, self.case.head_dim**-0.5)
        rel_pos = RelPos(*terms) if terms else None
        return replace(problem, rel_pos=rel_pos, key_row=row, key_column=column)


def make_inputs(case: Case) -> Inputs:
    """Draw the tensors; the same case always gives the same numbers."""
    generator = torch.Generator(device="cpu").manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
        return numbers.to(case.device, DTYPES[case.dtype])

    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    tensors = [random(*shape).mul_(QUERY_STD), random(*shape), random(*shape)]
    if case.rel_pos:  # each term gets a standard deviation of 1
        std = 1 / (QUERY_STD * case.head_dim**0.5)
        tables = [random(2 * side - 1, case.head_dim).mul_(std) for side in case.grid]
        tensors += decompose(tensors[0], tables[0], tables[1], case.grid)
    grad = random(*shape) if case.backward else None
    return Inputs(case, make_masks(case), tuple(tensors), grad)

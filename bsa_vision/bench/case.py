"""What one row of the benchmark measures, as plain data, and the tensors that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.rel_pos import RelPos, decompose
from bsa_vision.masks import Pattern, TokenLayout

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
# q is made this much wider than k: logits of standard deviation 2. Near-uniform attention would hide a wrong mask.
WIDTH_OF_Q = 2.0


@dataclass(frozen=True)
class Case:
    """One attention call to be measured in several ways.

    grid         (h, w) patches; there are no special tokens, so N = h * w
    pattern      the block mask of every head but the first `dense_heads`; random patterns draw anew for each head
    dtype        a name of `DTYPES`; device a torch device as text
    rel_pos      with a factored relative position
    backward     forward and gradient of all inputs, instead of forward alone
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
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, order=self.order, block_size=self.block_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = DTYPES[self.dtype]
        return dtype

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it; `from_json` reads it back."""
        return {**asdict(self), "grid": list(self.grid), "pattern": self.pattern.spec}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        return cls(**{**data, "grid": tuple(data["grid"]), "pattern": Pattern.from_spec(data["pattern"])})


def make_masks(case: Case) -> HeadMasks:
    """The heads' masks; ValueError where the pattern does not fit the grid or leaves a row empty."""
    types = [0] * case.dense_heads + [1] * (case.heads - case.dense_heads)
    if not any(types):
        return HeadMasks(None, types, layout=case.layout)
    layout = case.layout
    sparse = [case.pattern(layout, stream=head) for head in range(case.dense_heads, case.heads)]
    return HeadMasks(torch.stack(sparse)[None], types, layout=layout)  # (1, S, R, C)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors every way is given, in model order.

    q, k, v, grad  (B, H, N, D); `grad` is the gradient of the output, None without backward
    rel_pos        rel_h (B, H, N, h) and rel_w (B, H, N, w), or None
    """

    layout: TokenLayout
    q: Tensor
    k: Tensor
    v: Tensor
    rel_pos: RelPos | None
    grad: Tensor | None

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @cached_property
    def packed(self) -> Inputs:
        """The same tokens in packed order, for ways that know nothing of token order."""
        if self.layout.is_identity:
            return self
        index = self.layout.permutation.to(self.q.device)
        q, k, v = (x.index_select(2, index) for x in (self.q, self.k, self.v))
        rel_pos = None if self.rel_pos is None else RelPos(*(x.index_select(2, index) for x in self.rel_pos))
        grad = None if self.grad is None else self.grad.index_select(2, index)
        return Inputs(self.layout, q, k, v, rel_pos, grad)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """(N,) int64 each: patch row and column of the packed tokens."""
        row, column = self.layout.coordinates
        return row.to(self.q.device), column.to(self.q.device)


def make_inputs(case: Case) -> Inputs:
    """Random tensors; the same ones for the same case, in whatever process they are made."""
    generator = torch.Generator(device="cpu").manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
        return numbers.to(case.device, case.torch_dtype)

    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    q, k, v = random(*shape).mul_(WIDTH_OF_Q), random(*shape), random(*shape)
    rel_pos = None
    if case.rel_pos:  # terms of standard deviation 1 each
        width = 1 / (WIDTH_OF_Q * case.head_dim**0.5)
        tables = [random(2 * side - 1, case.head_dim).mul_(width) for side in case.grid]
        rel_pos = decompose(q, tables[0], tables[1], case.grid)
    return Inputs(case.layout, q, k, v, rel_pos, random(*shape) if case.backward else None)


def logits_std(inputs: Inputs) -> float:
    """Standard deviation of the scaled logits, relative position included, over a sample of 256 queries of image 0."""
    packed = inputs.packed
    rows = (
        torch.linspace(0, packed.q.shape[2] - 1, min(256, packed.q.shape[2]), device="cpu").long().to(packed.q.device)
    )
    q = packed.q[0].index_select(1, rows).float()  # (H, n, D)
    logits = inputs.scale * q @ packed.k[0].float().transpose(1, 2)  # (H, n, N)
    if packed.rel_pos is not None:
        rel_h, rel_w = (x[0].index_select(1, rows).float() for x in packed.rel_pos)
        row, column = packed.places
        logits = logits + rel_h[:, :, row] + rel_w[:, :, column]
    return float(logits.std())

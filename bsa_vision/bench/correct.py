"""Whether a way computed the right thing: its results against the `reference` backend in float64.

What may be wrong by rounding is measured, not guessed: plain dense attention (matmul, softmax, matmul) in the case's own
dtype is compared to float64 as well, and a way may be ALLOWANCE (or ALLOWANCE_LOW) times as far off as that. An error is that of the worst
token: the length of the difference of its vector, over the typical (root mean square) length of such vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.bench.ways import Ready, Setup

ALLOWANCE = 3.0
ALLOWANCE_LOW = 1.5  # float16, bfloat16: there plain attention rounds the logits as well, which fused kernels do not
# On top, in roundings of the accumulating dtype (float32, or float64): fused kernels rebuild a softmax from its logarithm,
# whose own rounding error is as large as a logit of 10 to 20 makes it. In low precision this is next to nothing.
ROUNDINGS = 64.0
WHOLE = 2**28  # up to so many logits (B x H x N x N) every one is checked: 16 heads of 4096 tokens
AT_ONCE = 2**24  # logits of one step, float64: 134 MB, and a few times that with temporaries

NAMES = ("out", "dq", "dk", "dv", "drel_h", "drel_w")
BY_KEY = ("dk", "dv")  # every query contributes to each of these


@dataclass(frozen=True)
class Error:
    """How far one tensor is off, and how far it may be; see `distance`."""

    found: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.found <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Sample:
    """The heads and blocks of queries that are checked; all of them where that is affordable."""

    heads: tuple[int, ...]
    blocks: tuple[int, ...]
    block_size: int
    tokens: int
    all_heads: int

    @property
    def whole(self) -> bool:
        return len(self.heads) == self.all_heads and sum(map(len, self.rows())) == self.tokens

    def rows(self) -> Iterator[range]:
        for block in self.blocks:
            yield range(block * self.block_size, min((block + 1) * self.block_size, self.tokens))

    def __str__(self) -> str:
        if self.whole:
            return "every value"
        rows = sum(map(len, self.rows()))
        return f"{rows:,} of {self.tokens:,} queries, {len(self.heads)} of {self.all_heads} heads"


def choose_sample(setup: Setup) -> Sample:
    """Everything, or what WHOLE logits allow: some blocks of queries of all heads, first and last among them; with
    backward one sparse head, because the gradient of a key needs every query."""
    case, blocks = setup.case, setup.case.layout.num_blocks
    heads, chosen = tuple(range(case.heads)), tuple(range(blocks))
    if case.batch * case.heads * case.tokens**2 > WHOLE:
        if case.backward:
            heads = heads[-1:]
        else:
            per_block = case.batch * case.heads * case.block_size * case.tokens
            count = min(blocks, max(2, WHOLE // 4 // per_block))
            chosen = tuple(sorted({round(i * (blocks - 1) / (count - 1)) for i in range(count)}))
    return Sample(heads, chosen, case.block_size, case.tokens, case.heads)


Expected = dict[str, Tensor]


class Truth:
    """What is right for one setup, on a sample of it.

    dense, masked    name of a result -> (B, heads of the sample, rows of the sample, ...) float64, packed order;
                     with and without relative position where that differs between ways
    allowed          name of a result -> allowed error
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.sample = setup, choose_sample(setup)
        self._known: dict[tuple[bool, bool], Expected] = {}
        biased = setup.inputs.rel_pos is not None
        plain = _compute(setup, self.sample, _plain, setup.case.torch_dtype, masked=False, biased=biased)
        exact = self.expected(masked=False, biased=biased)
        dtype = setup.case.torch_dtype
        self.allowed = {name: allowed(distance(plain[name], exact[name]), dtype) for name in exact}

    def expected(self, masked: bool, biased: bool) -> Expected:
        key = masked, biased
        if key not in self._known:
            self._known[key] = _compute(
                self.setup, self.sample, _definition, torch.float64, masked=masked, biased=biased
            )
        return self._known[key]

    def errors(self, ready: Ready, results: tuple[Tensor, ...], masked: bool, biased: bool) -> dict[str, Error]:
        """How far `results` of `ready.run()` are off."""
        expected = self.expected(masked, biased)
        found = {}
        for name, result in zip(NAMES, results, strict=False):
            if not ready.packed and not self.setup.inputs.layout.is_identity:
                result = result.index_select(2, self.setup.inputs.layout.permutation.to(result.device))
            picked = _pick(name, result, self.sample)
            found[name] = Error(distance(picked, expected[name]), self.allowed[name])
        return found


def allowed(plain: float, dtype: torch.dtype) -> float:
    """How far a way may be off where plain attention in `dtype` is off by `plain`."""
    accumulating = torch.promote_types(dtype, torch.float32)
    factor = ALLOWANCE if dtype == accumulating else ALLOWANCE_LOW
    return factor * plain + ROUNDINGS * torch.finfo(accumulating).eps


def distance(result: Tensor, expected: Tensor) -> float:
    """Error of the worst token over the typical length of a token's vector (the last axis); NaN when any value is."""
    length = expected.double().norm(dim=-1)
    return float((result.double() - expected.double()).norm(dim=-1).max() / length.square().mean().sqrt())


def _pick(name: str, result: Tensor, sample: Sample) -> Tensor:
    """The sample's heads and rows of (B, H, N, ...); gradients of keys have all rows."""
    result = result[:, list(sample.heads)]
    if name in BY_KEY or len(sample.blocks) * sample.block_size >= sample.tokens:
        return result
    rows = torch.cat([torch.arange(r.start, r.stop, device="cpu") for r in sample.rows()])
    return result.index_select(2, rows.to(result.device))


# (q, k, v, rel_pos or None, mask, setup) -> (B, 1, n, Dv): one head, n queries, in packed order
Attend = Callable[[Tensor, Tensor, Tensor, RelPos | None, HeadMasks, Setup], Tensor]


def _definition(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, masks: HeadMasks, setup: Setup) -> Tensor:
    row, column = setup.inputs.packed.places
    problem = Problem(q, k, v, masks, setup.inputs.scale, rel_pos=rel_pos, key_row=row, key_column=column)
    out: Tensor = BACKENDS["reference"].run(problem).out
    return out


def _plain(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, masks: HeadMasks, setup: Setup) -> Tensor:
    logits = setup.inputs.scale * q @ k.transpose(2, 3)
    if rel_pos is not None:
        row, column = setup.inputs.packed.places
        logits = logits + rel_pos.rel_h[..., row] + rel_pos.rel_w[..., column]
    return logits.softmax(-1) @ v


def _compute(
    setup: Setup, sample: Sample, attend: Attend, dtype: torch.dtype, *, masked: bool, biased: bool
) -> Expected:
    """Results and gradients on the sample, a head and some blocks of rows at a time, so that memory stays bounded."""
    blocks = setup.masks.block_mask(setup.case.tokens, setup.case.tokens)[0]  # (H, R, C)
    heads = []
    for head in sample.heads:
        mask = blocks[head] if masked else torch.ones_like(blocks[head])
        heads.append(_one_head(setup, sample, attend, dtype, head, mask, biased))
    return {name: torch.cat([result[name] for result in heads], 1) for name in heads[0]}


def _one_head(
    setup: Setup, sample: Sample, attend: Attend, dtype: torch.dtype, head: int, mask: Tensor, biased: bool
) -> Expected:
    """name -> (B, 1, rows, ...). `mask` (R, C)."""
    inputs = setup.inputs.packed
    k, v = (x[:, head : head + 1].to(dtype) for x in (inputs.k, inputs.v))
    by_row: dict[str, list[Tensor]] = {}
    by_key: dict[str, Tensor] = {}
    for part in _steps(sample, setup.case.batch):
        rows, numbers = _row_indices(part, sample)
        rows = rows.to(k.device)
        rel = inputs.rel_pos if biased else None
        own = [x[:, head : head + 1].index_select(2, rows).to(dtype) for x in (inputs.q, *(rel or ()))]
        masks = HeadMasks(mask[numbers][None, None], block_size=sample.block_size)
        grad = None if inputs.grad is None else inputs.grad[:, head : head + 1].index_select(2, rows).to(dtype)
        for name, value in _one_step(setup, attend, own, (k, v), masks, grad).items():
            if name in BY_KEY:
                by_key[name] = by_key[name] + value.double() if name in by_key else value.double()
            else:
                by_row.setdefault(name, []).append(value)
    return {**{name: torch.cat(values, 2) for name, values in by_row.items()}, **by_key}


def _one_step(
    setup: Setup, attend: Attend, own: list[Tensor], keys: tuple[Tensor, Tensor], masks: HeadMasks, grad: Tensor | None
) -> Mapping[str, Tensor]:
    """`own` is q and, with relative position, rel_h and rel_w of some rows; (B, 1, n, ...)."""
    if grad is None:
        with torch.no_grad():
            return {"out": attend(own[0], *keys, RelPos(*own[1:]) if own[1:] else None, masks, setup)}
    leaves = [x.detach().requires_grad_() for x in (own[0], *keys, *own[1:])]
    out = attend(leaves[0], leaves[1], leaves[2], RelPos(*leaves[3:]) if leaves[3:] else None, masks, setup)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad)), strict=False))


def _steps(sample: Sample, batch: int) -> Iterator[tuple[int, ...]]:
    """The sample's blocks of rows, as many together as AT_ONCE logits allow."""
    together = max(1, AT_ONCE // (batch * sample.block_size * sample.tokens))
    for i in range(0, len(sample.blocks), together):
        yield sample.blocks[i : i + together]


def _row_indices(blocks: tuple[int, ...], sample: Sample) -> tuple[Tensor, list[int]]:
    """(n,) int64 packed positions of the queries of `blocks`, and the blocks as a list to index with.

    Only the last block of all may be short, and it comes last, so the rows of a step are whole blocks and a tail.
    """
    ranges = [range(b * sample.block_size, min((b + 1) * sample.block_size, sample.tokens)) for b in blocks]
    return torch.cat([torch.arange(r.start, r.stop, device="cpu") for r in ranges]), list(blocks)

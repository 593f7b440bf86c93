"""Draw random attention problems of all head types, grouped, ragged and causal."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass
class Varlen:
    """Arguments of block_sparse_attn_func."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    head_mask_type: Tensor
    streaming_info: Tensor | None
    base_blockmask: Tensor | None
    max_seqlens: tuple[int, int]
    causal: bool
    exact: bool
    scale: float | None

    def call(self, function, **options):
        return function(
            self.q,
            self.k,
            self.v,
            self.cu_q,
            self.cu_k,
            self.head_mask_type,
            self.streaming_info,
            self.base_blockmask,
            *self.max_seqlens,
            0.0,
            softmax_scale=self.scale,
            is_causal=self.causal,
            exact_streaming=self.exact,
            **options,
        )


@st.composite
def varlens(
    draw, max_tokens: int = 300, dtype: torch.dtype = torch.float64, exact: bool | None = None
) -> Varlen:
    """Draw a ragged problem in blocks of 128, with logits of standard deviation about 1."""
    lengths_q = draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=2))
    other_keys = draw(st.booleans())
    lengths_k = [draw(st.integers(1, max_tokens)) for _ in lengths_q] if other_keys else lengths_q
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = key_heads * group
    dim = draw(st.sampled_from([4, 8, 12]))
    causal = draw(st.booleans())
    exact = (causal and draw(st.booleans())) if exact is None else exact
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q = torch.randn(sum(lengths_q), heads, dim, generator=generator, dtype=dtype)
    k, v = (
        torch.randn(sum(lengths_k), key_heads, dim, generator=generator, dtype=dtype)
        for _ in range(2)
    )
    types = [draw(st.sampled_from([-1, 0, 1])) for _ in range(heads)]
    slices = types.count(1)
    if draw(st.booleans()):  # explicit slice numbers, so that heads share slices
        types = [draw(st.integers(1, 2)) if kind == 1 else kind for kind in types]
        slices = 2 if 2 in types else types.count(1)
    if types.count(1) > 1 and 2 in types and types.count(1) + types.count(2) == slices:
        slices += 1  # avoid the ambiguous form, which is rejected
    max_seqlens = tuple(max(x) + draw(st.integers(0, 9)) for x in (lengths_q, lengths_k))
    base = None
    if slices:
        rows, columns = (-(-n // 128) for n in max_seqlens)
        density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
        base = torch.rand(len(lengths_q), slices, rows, columns, generator=generator) < density
    streaming = None
    if -1 in types or draw(st.booleans()):
        limit = 200 if exact else 2
        streaming = torch.tensor(
            [draw(st.integers(0, limit)) for _ in range(2 * heads)], dtype=torch.int32
        )
    return Varlen(
        q,
        k,
        v,
        torch.tensor([0, *accumulate(lengths_q)], dtype=torch.int32),
        torch.tensor([0, *accumulate(lengths_k)], dtype=torch.int32),
        torch.tensor(types, dtype=torch.int32),
        streaming,
        base,
        max_seqlens,
        causal,
        exact,
        draw(st.sampled_from([None, 0.5])),
    )

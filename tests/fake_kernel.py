"""A stand-in for the package block_sparse_attn that behaves as v0.0.2 does, traps included, on the CPU.

It checks what upstream checks and leaves undone what upstream leaves undone, so that marshalling is tested without a GPU.
"""

from __future__ import annotations

import math
import types

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import attend

GARBAGE = float("nan")


def block_sparse_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor | None,
    base_blockmask: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    exact_streaming: bool = False,
    return_attn_probs: bool = False,
):
    for x in (q, k, v):
        assert x.dtype == q.dtype
        assert x.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16"
        assert x.stride(-1) == 1
    for x in (cu_seqlens_q, cu_seqlens_k, head_mask_type, streaming_info):
        assert x is None or (x.dtype == torch.int32 and x.is_contiguous())
    heads, dim = q.shape[1:]
    assert head_mask_type.shape == (heads,)
    assert streaming_info is None or streaming_info.shape == (2 * heads,)
    # Only entries equal to 1 are counted; others >= 2 are taken as they are.
    ones = head_mask_type == 1
    numbered = torch.where(ones, ones.cumsum(0), head_mask_type.long()).tolist()
    images = len(cu_seqlens_q) - 1
    if base_blockmask is not None:
        assert base_blockmask.shape[1] == int(ones.sum())
        blocks = (math.ceil(max_seqlen_q_ / 128), math.ceil(max_seqlen_k_ / 128))
        assert base_blockmask.shape == (images, int(ones.sum()), *blocks)
    assert not exact_streaming or is_causal
    assert v.shape[-1] == dim, "v must have q's head dim"
    if dim % 8:  # padded on the way in, never sliced on the way out
        q, k, v = (F.pad(x, (0, 8 - dim % 8)) for x in (q, k, v))
    assert q.shape[-1] <= 256
    if q.shape[-1] > 128:  # no kernel is launched
        out = torch.full_like(q, GARBAGE)
        lse = torch.full((images, heads, max_seqlen_q_), GARBAGE)
    else:
        scale = dim**-0.5 if softmax_scale is None else softmax_scale
        if max(numbered) == 1:
            numbered = [2 * (kind == 1) or kind for kind in numbered]  # tell the oracle these are explicit
            base_blockmask = torch.cat([base_blockmask[:, :1]] * 2, 1)
        out, lse = attend(
            q,
            k,
            v,
            cu_seqlens_q.tolist(),
            cu_seqlens_k.tolist(),
            numbered,
            None if streaming_info is None else streaming_info.tolist(),
            base_blockmask,
            causal=is_causal,
            exact=exact_streaming,
            scale=scale,
            longest=max_seqlen_q_,
        )
        out, lse = out.to(q.dtype), lse.float()
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def make_module() -> types.ModuleType:
    module = types.ModuleType("block_sparse_attn")
    module.__file__ = __file__
    module.block_sparse_attn_func = block_sparse_attn_func
    return module

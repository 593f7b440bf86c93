"""Stand-in for the package block_sparse_attn v0.0.2 on the CPU, pitfalls included.

It has the same checks and omissions as upstream, so that the backend is tested without a GPU.
"""

from __future__ import annotations

import math
import types

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.oracle import attend

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
    # Entries equal to 1 are numbered; entries >= 2 are used unchanged.
    ones = head_mask_type == 1
    numbered = torch.where(ones, ones.cumsum(0), head_mask_type.long()).tolist()
    images = len(cu_seqlens_q) - 1
    if base_blockmask is not None:
        assert base_blockmask.shape[1] == int(ones.sum())
        blocks = (math.ceil(max_seqlen_q_ / 128), math.ceil(max_seqlen_k_ / 128))
        assert base_blockmask.shape == (images, int(ones.sum()), *blocks)
    assert not exact_streaming or is_causal
    assert v.shape[-1] == dim, "v must have q's head dim"
    if dim % 8:  # upstream pads the inputs and never slices the output
        q, k, v = (F.pad(x, (0, 8 - dim % 8)) for x in (q, k, v))
    assert q.shape[-1] <= 256
    if q.shape[-1] > 128:  # no kernel is launched
        out = torch.full_like(q, GARBAGE)
        lse = torch.full((images, heads, max_seqlen_q_), GARBAGE)
    else:
        scale = dim**-0.5 if softmax_scale is None else softmax_scale
        numbered, base_blockmask = _explicit(numbered, base_blockmask)
        out, lse = attend(
            *(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), numbered),
            None if streaming_info is None else streaming_info.tolist(),
            base_blockmask,
            causal=is_causal,
            exact=exact_streaming,
            scale=scale,
            max_seqlen=max_seqlen_q_,
        )
        out, lse = out.to(q.dtype), lse.float()
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def _explicit(numbered: list[int], base: Tensor | None) -> tuple[list[int], Tensor | None]:
    """Use slice 2 if only slice 1 is used, because the oracle would number entries of 1 itself."""
    if max(numbered) != 1:
        return numbered, base
    return [2 * (kind == 1) or kind for kind in numbered], torch.cat([base[:, :1]] * 2, 1)


# The operators below the public function, which get converted masks


def forward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    m_block_dim: int,
    n_block_dim: int,
    head_mask_type: Tensor,
    streaming_info: Tensor,
    row_blockmask: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    exact_streaming: bool,
    return_softmax: bool,
    window_size_left: int,
    window_size_right: int,
):
    assert (m_block_dim, n_block_dim, window_size_left, window_size_right) == (128, 128, -1, -1)
    assert p_dropout == 0, "the stand-in has no dropout"
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] in (32, 64, 128)
    ends, limits = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q_, max_seqlen_k_)
    base = decode(row_blockmask, head_mask_type, streaming_info, ends, limits)
    with torch.no_grad():
        out, lse = _attend(
            *(q, k, v, ends, head_mask_type, streaming_info, base, max_seqlen_q_),
            *(softmax_scale, is_causal, exact_streaming),
        )
    return out.to(q.dtype), lse.float(), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def backward_operator(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    m_block_dim: int,
    n_block_dim: int,
    head_mask_type: Tensor,
    streaming_info: Tensor,
    col_blockmask: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    deterministic: bool,
    rng_state: Tensor | None = None,
):
    assert zero_tensors
    assert dout.shape == out.shape == q.shape
    assert rng_state is not None
    ends = (cu_seqlens_q, cu_seqlens_k)
    base = decode(
        col_blockmask, head_mask_type, streaming_info, ends[::-1], (max_seqlen_k_, max_seqlen_q_)
    )
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again, _ = _attend(
            *(*leaves, ends, head_mask_type, streaming_info, None if base is None else base.mT),
            *(max_seqlen_q_, softmax_scale, is_causal, False),
        )
        again = again + 0 * sum(x.sum() for x in leaves)  # a graph even if no query has keys
    for to, grad in zip((dq, dk, dv), torch.autograd.grad(again, leaves, dout.double())):
        to.copy_(grad)


def decode(
    lists: Tensor | None,
    head_mask_type: Tensor,
    streaming_info: Tensor,
    ends: tuple[Tensor, Tensor],
    limits: tuple[int, int],
) -> Tensor | None:
    """Convert (images, S, R, C) lists to bool, with the checks of the C++ code.

    Its loops rely on the order: descending, then -1.
    """
    for x in (*ends, head_mask_type, streaming_info):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    assert streaming_info.shape == (2 * len(head_mask_type),)
    slices = [kind for kind in head_mask_type.tolist() if kind > 0]
    assert slices == list(range(1, len(slices) + 1))
    if lists is None:
        assert not slices
        return None
    assert lists.dtype == torch.int32
    assert lists.is_contiguous()
    blocks = [math.ceil(limit / 128) for limit in limits]
    assert lists.shape == (len(ends[0]) - 1, len(slices), *blocks)
    assert ((lists.diff(dim=-1) < 0) | (lists[..., 1:] == -1)).all()
    # Only as many entries of a list are read as the image has blocks.
    read = -(-ends[1].diff() // 128)
    lists = lists.masked_fill(torch.arange(lists.shape[-1]) >= read[:, None, None, None], -1)
    listed = F.one_hot(lists.long() + 1, lists.shape[-1] + 1)[..., 1:]  # (images, S, R, entries, C)
    return listed.sum(-2).bool()


def _attend(q, k, v, ends, head_mask_type, streaming_info, base, max_seqlen, scale, causal, exact):
    numbered, base = _explicit(head_mask_type.tolist(), base)
    bounds = [x.tolist() for x in ends]
    options = dict(causal=causal, exact=exact, scale=scale, max_seqlen=max_seqlen)
    return attend(q, k, v, *bounds, numbered, streaming_info.tolist(), base, **options)


def make_modules() -> dict[str, types.ModuleType]:
    """Return the stand-in modules by import name."""
    package = types.ModuleType("block_sparse_attn")
    interface = types.ModuleType("block_sparse_attn.block_sparse_attn_interface")
    for module in (package, interface):
        module.__file__ = __file__
        module.block_sparse_attn_func = block_sparse_attn_func
    package.__path__ = []
    package.block_sparse_attn_interface = interface
    interface._wrapped_block_sparse_attn_forward = forward_operator
    interface._wrapped_block_sparse_attn_backward = backward_operator
    return {module.__name__: module for module in (package, interface)}

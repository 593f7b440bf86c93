"""Attention with per-head block masks.

`sparse_attention` takes the shapes of torch's scaled_dot_product_attention. The functions of the
block_sparse_attn package follow, with the same signatures, for any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bsa_vision.attention.arguments import (
    check_fit,
    check_head_masks,
    check_numbers,
    check_tensors,
    check_varlen,
)
from bsa_vision.attention.backends.problem import Call, Problem, Result
from bsa_vision.attention.backends.select import choose
from bsa_vision.attention.carried_masks import carried, is_recording, plain_number, plain_sizes
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_source import MaskSource
from bsa_vision.attention.onnx_form import is_exporting_onnx, masked_dense
from bsa_vision.attention.operator import attention_op
from bsa_vision.attention.packing import pack, pack_head_masks, unpack
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.attention.token_order import attend


def sparse_attention(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    head_masks: HeadMasks | Sequence[HeadMasks],
    *,
    rel_pos: RelPos | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """Compute attention in the blocks that `head_masks` keeps. Differentiable.

    q           (B, H, N, D) in model order, or a list of (H, n, D) images of different sizes with
                one HeadMasks each
    k, v        (B, G, M, D) and (B, G, M, Dv), H a multiple of G; M = N without a `kv_layout`
    rel_pos     factored relative position (`RelPos`), added to the logits
    scale       factor of q . k; default D ** -0.5
    backend     "auto" uses the first backend that supports the call, on GPUs the fastest one
                measured; a name uses that backend or raises BackendUnavailable

    Returns (B, H, N, Dv), or a list of (H, n, Dv).

        >>> layout = masks.TokenLayout((64, 64), num_prefix_tokens=1, order="tile")
        >>> hm = HeadMasks.from_patterns(layout, masks.Pattern("local_window", radius=8), heads=12)
        >>> out = sparse_attention(q, k, v, hm)
    """
    check_head_masks(head_masks, q)
    check_numbers(dropout_p, scale)
    if isinstance(head_masks, HeadMasks) and isinstance(q, (list, tuple)):
        raise TypeError(
            f"q is a list of {len(q)} images, head_masks one HeadMasks: pass a list with one "
            "HeadMasks per image."
        )
    if isinstance(head_masks, HeadMasks):
        q, k, v = cast(Tensor, q), cast(Tensor, k), cast(Tensor, v)
        check_tensors(q, k, v, 4, "(B, H, N, D)", head_masks.num_heads)
        check_fit(q, k, head_masks, rel_pos)
        return attend_masks(
            head_masks, q, k, v, rel_pos=rel_pos, scale=scale, dropout_p=dropout_p, backend=backend
        )
    if rel_pos is not None:
        raise ValueError(
            "rel_pos with a list of images: relative position needs one grid; call once per image "
            "size."
        )
    return _ragged_attention(list(q), list(k), list(v), list(head_masks), scale, dropout_p, backend)


def _ragged_attention(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    masks: list[HeadMasks],
    scale: float | None,
    dropout_p: float,
    backend: str,
) -> list[Tensor]:
    if not len(q) == len(k) == len(v) == len(masks):
        raise ValueError(
            f"{len(q)} images in q, {len(k)} in k, {len(v)} in v and {len(masks)} HeadMasks: the "
            "lists must have the same length."
        )
    for image_q, image_k, image_v, image_masks in zip(q, k, v, masks, strict=True):
        check_tensors(image_q, image_k, image_v, 3, "(H, n, D) per image", image_masks.num_heads)
        check_fit(image_q[None], image_k[None], image_masks, None)
        if image_q.dtype != q[0].dtype or image_q.device != q[0].device:
            raise TypeError(
                f"images are {image_q.dtype} on {image_q.device} and {q[0].dtype} on "
                f"{q[0].device}: expected one dtype and one device; convert them with .to(q[0])."
            )
    packed_q = pack(q, [m.layout for m in masks])
    packed_k, packed_v = (pack(x, [m.kv_layout for m in masks]) for x in (k, v))
    packed = (packed_q, packed_k, packed_v)
    tokens = _autocast(*(p.tokens.transpose(0, 1)[None] for p in packed))  # (1, H, T, D) each
    call = Call(
        tokens[0],
        tokens[1],
        tokens[2],
        cu_seqlens_q=packed_q.cu_seqlens,
        cu_seqlens_k=packed_k.cu_seqlens,
        seed=_seed() if dropout_p else None,
        max_seqlen_q=packed_q.max_seqlen,
        max_seqlen_k=packed_k.max_seqlen,
        scale=q[0].shape[-1] ** -0.5 if scale is None else scale,
        dropout_p=dropout_p,
        backend=backend,
    )
    result = _run(call, pack_head_masks(masks))
    return cast(list[Tensor], unpack(result.out[0].transpose(0, 1), packed_q))


def attend_masks(
    source: MaskSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int] = (0, 0),
    rel_pos: RelPos | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute `sparse_attention` with the masks `source.masks_for(grid, M)`, without checks.

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, Dv) -> (B, H, N, Dv).
    """
    q, k, v = _autocast(q, k, v)
    rel_h, rel_w = (None, None) if rel_pos is None else rel_pos
    call = Call(
        q,
        k,
        v,
        rel_h,
        rel_w,
        seed=_seed() if dropout_p else None,
        grid_h=grid[0],
        grid_w=grid[1],
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p=dropout_p,
        backend=backend,
    )
    return _run(call, source).out


def _run(
    call: Call,
    source: MaskSource | None,
    *,
    deterministic: bool = False,
    return_probs: bool = False,
) -> Result:
    """Choose a backend and run it.

    source  an object with `masks_for`; None if `call` has the masks as the kernel's tensors

    In compiled and recorded programs every call is an operator (`operator`). Otherwise only
    `gather` is one, if `_needs_operator`; torch differentiates the other backends.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None:
        return _record(call, source, return_probs)
    masks = _masks(call, source)
    problem = call.problem(masks, deterministic=deterministic, return_probs=return_probs)
    backend = choose(problem, call.backend)
    _refuse_forward_mode(backend, call.q, call.k, call.v)
    if backend == "gather" and _needs_operator(problem):
        return Result(*attention_op(*call._replace(handle=masks.handle, backend=backend)))
    return attend(problem, backend)


def _needs_operator(problem: Problem) -> bool:
    """Return whether `gather` must run as an operator.

    Its gradient needs one; torch.func transforms, dispatch modes and tensor subclasses observe
    operators only. A plain call costs less. It is also safe in a daemon thread while the
    interpreter exits, when an operator may read memory that torch has freed.
    """
    tensors = (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))
    return (
        problem.needs_gradient
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
        or not PLAIN.issuperset(map(type, tensors))
    )


PLAIN = {Tensor, Parameter}


def _record(call: Call, source: MaskSource | None, return_probs: bool) -> Result:
    """Record a call in a program that is being compiled, traced or exported."""
    if return_probs:
        raise ValueError(
            "return_attn_probs with dropout is not supported under torch.compile or torch.export: "
            "call it outside of compiled code."
        )
    height, width, num_keys = plain_sizes(call.grid_h, call.grid_w, call.k.shape[2])
    call = call._replace(grid_h=height, grid_w=width, scale=plain_number(call.scale))
    if source is None:
        return Result(*attention_op(*call))
    if is_recording() and is_exporting_onnx():
        return Result(masked_dense(call, source))
    if is_recording():
        stored = carried(source, (height, width), num_keys)
        return Result(*attention_op(*call._replace(carried=stored)))
    return Result(*attention_op(*call._replace(handle=source.dynamic_handle)))


def _masks(call: Call, source: MaskSource | None) -> HeadMasks:
    if source is not None:
        return source.masks_for((call.grid_h, call.grid_w), call.k.shape[2])
    return HeadMasks(
        call.base_blockmask, call.head_mask_type, call.streaming_info, allow_empty_rows=True
    )


def _seed() -> Tensor:
    return torch.randint(2**62, (1,), device="cpu")


def _refuse_forward_mode(backend: str, *tensors: Tensor) -> None:
    """Raise RuntimeError for forward-mode tangents, which an operator would silently drop."""
    if backend in ("reference", "sdpa"):  # torch's own operations
        return
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise RuntimeError(
            f"{backend!r} does not support forward-mode differentiation (jvp): use reverse mode, "
            "or backend='reference' or 'sdpa'."
        )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in autocast's dtype if it is enabled, as torch's attention does."""
    device = tensors[0].device.type
    if (
        device == "meta"
        or not torch.is_autocast_enabled(device)
        or tensors[0].dtype == torch.float64
    ):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


# Functions of the block_sparse_attn package


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
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute mit-han-lab's `block_sparse_attn_func` on any device and dtype.

    q                (total_q, H, D); k, v (total_k, G, D) with H a multiple of G
    cu_seqlens_*     (batch + 1,) int32
    head_mask_type   (H,) int32, streaming_info (2 * H,) int32 or None: see `HeadMasks`
    base_blockmask   (batch or 1, S, ceil(max_seqlen_q_ / 128), ceil(max_seqlen_k_ / 128)) bool,
                     or None
    is_causal        bottom-right aligned
    exact_streaming  causal only: sinks and windows are counted in tokens

    Tokens are not reordered. A query without keys gives 0 and LSE +inf.

    Returns out (total_q, H, D), or with return_attn_probs (out, lse, S_dmask). lse is
    (batch, H, max_seqlen_q_) float32 without gradient. S_dmask is empty without dropout, else
    (batch, H, queries, keys) with lengths rounded up to blocks: probabilities before dropout,
    negated where dropped. Backend `kernel` returns S_dmask in the order of its registers.
    """
    masks = (head_mask_type, streaming_info, base_blockmask)
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q_, max_seqlen_k_)
    heads = head_mask_type.numel() if isinstance(head_mask_type, Tensor) else None
    check_tensors(q, k, v, 3, "(total, H, D)", heads)
    check_numbers(p_dropout, softmax_scale)
    check_varlen(q, k, cu_seqlens, masks, max_seqlens, is_causal, exact_streaming)
    q, k, v = _autocast(*(x.transpose(0, 1)[None] for x in (q, k, v)))  # (1, H, T, D)
    call = Call(
        q, k, v, None, None, *cu_seqlens, *masks, None, _seed() if p_dropout else None
    )._replace(
        max_seqlen_q=max_seqlen_q_,
        max_seqlen_k=max_seqlen_k_,
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        is_causal=is_causal,
        exact_streaming=exact_streaming,
        dropout_p=p_dropout,
        return_lse=return_attn_probs,
    )
    return_probs = return_attn_probs and p_dropout > 0
    out, lse, probs = _run(call, None, deterministic=deterministic, return_probs=return_probs)
    out = out[0].transpose(0, 1)  # (T, H, D)
    if not return_attn_probs:
        return out
    assert lse is not None
    return out, lse.detach().float(), q.new_empty(0) if probs is None else probs.detach()


def block_streaming_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    is_causal: bool = True,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute mit-han-lab's `block_streaming_attn_func`: dense and streaming heads.

    Windows are counted in blocks. See `block_sparse_attn_func` for arguments and results.
    """
    return block_sparse_attn_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k),
        *(head_mask_type, streaming_info, None),
        *(max_seqlen_q_, max_seqlen_k_),
        p_dropout,
        deterministic,
        softmax_scale,
        is_causal,
        return_attn_probs=return_attn_probs,
    )


def token_streaming_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute mit-han-lab's `token_streaming_attn_func`: causal, dense and streaming heads.

    Windows are counted in tokens. See `block_sparse_attn_func` for arguments and results.
    """
    return block_sparse_attn_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k),
        *(head_mask_type, streaming_info, None),
        *(max_seqlen_q_, max_seqlen_k_),
        0.0,
        deterministic,
        softmax_scale,
        is_causal=True,
        exact_streaming=True,
        return_attn_probs=return_attn_probs,
    )

"""Attention with per-head block masks: `sparse_attention` in SDPA's shapes, and the kernel's own functions on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bsa_vision.arguments import check_fit, check_head_masks, check_numbers, check_tensors, check_varlen
from bsa_vision.backends import Problem, Result, choose
from bsa_vision.carried_masks import carried, is_recording, plain_sizes
from bsa_vision.custom_op import attend, attention_op, needs_operator
from bsa_vision.head_masks import Handled, HeadMasks
from bsa_vision.onnx_form import is_exporting_onnx, masked_dense
from bsa_vision.packing import pack, pack_head_masks, unpack
from bsa_vision.rel_pos import RelPos


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
    """Attention that computes the blocks `head_masks` keeps. Differentiable.

    q           (B, H, N, D) in model order, or a list of (H, n, D) images of different sizes, one HeadMasks each
    k, v        (B, G, M, D) and (B, G, M, Dv) with H a multiple of G; M = N unless `head_masks` says otherwise
    rel_pos     factored relative position (`RelPos`), added to the logits
    scale       of q . k; None = D ** -0.5
    backend     "auto" takes the first that can, on GPUs the fastest as far as measured; a name takes that one or raises
                BackendUnavailable

    Returns (B, H, N, Dv), or a list of (H, n, Dv).

        >>> layout = masks.TokenLayout((64, 64), start=1, order="tile")
        >>> hm = HeadMasks.from_patterns(layout, masks.Pattern("local_window", radius=8), heads=12)
        >>> out = sparse_attention(q, k, v, hm)
    """
    check_head_masks(head_masks, q)
    check_numbers(dropout_p, scale)
    if isinstance(head_masks, HeadMasks) and isinstance(q, (list, tuple)):
        raise TypeError(
            f"q is a list of {len(q)} images, head_masks one HeadMasks: pass a list with one HeadMasks per image."
        )
    if isinstance(head_masks, HeadMasks):
        q, k, v = cast(Tensor, q), cast(Tensor, k), cast(Tensor, v)
        check_tensors(q, k, v, 4, "(B, H, N, D)", head_masks.num_heads)
        check_fit(q, k, head_masks, rel_pos)
        return attend_masks(head_masks, q, k, v, rel_pos=rel_pos, scale=scale, dropout_p=dropout_p, backend=backend)
    if rel_pos is not None:
        raise ValueError("rel_pos with a list of images: relative position needs one grid; call once per image size.")
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
            f"{len(q)} images in q, {len(k)} in k, {len(v)} in v and {len(masks)} HeadMasks: the lists must be equally long."
        )
    for image_q, image_k, image_v, image_masks in zip(q, k, v, masks, strict=True):
        check_tensors(image_q, image_k, image_v, 3, "(H, n, D) per image", image_masks.num_heads)
        check_fit(image_q[None], image_k[None], image_masks, None)
        if image_q.dtype != q[0].dtype or image_q.device != q[0].device:
            raise TypeError(
                f"images are {image_q.dtype} on {image_q.device} and {q[0].dtype} on {q[0].device}: one dtype and device are "
                "needed; convert them with .to(q[0])."
            )
    packed_q = pack(q, [m.layout for m in masks])
    packed_k, packed_v = (pack(x, [m.kv_layout for m in masks]) for x in (k, v))
    result = _run(
        pack_head_masks(masks),
        *(p.tokens.transpose(0, 1)[None] for p in (packed_q, packed_k, packed_v)),
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
        cu_seqlens=(packed_q.cu_seqlens, packed_k.cu_seqlens),
        longest=(packed_q.max_seqlen, packed_k.max_seqlen),
    )
    return cast(list[Tensor], unpack(result.out[0].transpose(0, 1), packed_q))


def attend_masks(
    source: Handled,
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
    """`sparse_attention` for masks found by `source.masks_for(grid, number of keys)`, unchecked; (B, H, N, D) -> (B, H, N, Dv)."""
    return _run(source, q, k, v, grid=grid, rel_pos=rel_pos, scale=scale, dropout_p=dropout_p, backend=backend).out


def _run(
    source: Handled | tuple[Tensor | None, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int] = (0, 0),
    rel_pos: RelPos | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    cu_seqlens: tuple[Tensor | None, Tensor | None] = (None, None),
    longest: tuple[int, int] = (0, 0),
    is_causal: bool = False,
    exact_streaming: bool = False,
    deterministic: bool = False,
    return_probs: bool = False,
    return_lse: bool = False,
) -> Result:
    """Choose a backend and run it. `source` is an object with `masks_for`, or (head_mask_type, streaming_info, blockmask).

    `gather` goes through the operator where it is differentiated, and so does everything under torch.compile. The other
    backends are differentiated by torch or bring their own gradient, so they run directly where Python runs anyway.
    """
    q, k, v = _autocast(q, k, v)
    head_dim, num_keys, height, width = plain_sizes(q.shape[-1], k.shape[2], *grid)
    grid, scale = (height, width), head_dim**-0.5 if scale is None else scale
    seed = torch.randint(2**62, (1,), device="cpu") if dropout_p else None
    rel_h, rel_w = (None, None) if rel_pos is None else rel_pos
    # How the operator learns of the masks: a handle, or in a program that is saved a tensor; else the kernel's tensors.
    handle, stored = 0, None
    raw: tuple[Tensor | None, ...] = (None, None, None)
    recording = is_recording()
    if not recording and not torch.compiler.is_compiling():
        masks = _masks(source, grid, num_keys)
        problem = Problem(
            q,
            k,
            v,
            masks,
            scale,
            cu_seqlens_q=cu_seqlens[0],
            cu_seqlens_k=cu_seqlens[1],
            max_q=longest[0] or None,
            max_k=longest[1] or None,
            is_causal=is_causal,
            exact_streaming=exact_streaming,
            dropout_p=dropout_p,
            seed=0 if seed is None else int(seed),
            deterministic=deterministic,
            rel_pos=rel_pos,
            return_lse=return_lse,
            return_probs=return_probs,
        )
        backend = choose(problem, backend)
        _refuse_forward_mode(backend, q, k, v)
        if backend != "gather" or not needs_operator(problem):
            return attend(problem, backend)
        handle = masks.handle
    elif return_probs:
        raise ValueError(
            "return_attn_probs with dropout under torch.compile or torch.export: the dropout mask is not returned; "
            "call it outside of them."
        )
    elif not isinstance(source, Handled):
        raw = source
    elif recording and is_exporting_onnx():
        return Result(masked_dense(source, grid, q, k, v, rel_pos, scale))
    elif recording:
        stored = carried(source, grid, num_keys)
    else:
        handle = source.dynamic_handle
    numbers = (handle, *grid, *longest, scale, is_causal, exact_streaming, dropout_p, return_lse)
    out, lse = attention_op(q, k, v, rel_h, rel_w, *cu_seqlens, *raw, stored, seed, *numbers, backend)
    return Result(out, lse)


def _refuse_forward_mode(backend: str, *tensors: Tensor) -> None:
    """Forward-mode differentiation would take the operator for a constant, without a word."""
    if backend in ("reference", "sdpa"):  # torch's own operations
        return
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f"forward-mode differentiation (jvp) does not reach through {backend!r}: use reverse mode, or backend='reference' or 'sdpa', "
            "which torch differentiates either way."
        )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as torch's own attention would take them: in autocast's dtype where that is on."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _masks(source: Handled | tuple[Tensor | None, ...], grid: tuple[int, int], num_keys: int) -> HeadMasks:
    if isinstance(source, tuple):
        head_mask_type, streaming_info, base_blockmask = source
        return HeadMasks(base_blockmask, head_mask_type, streaming_info, allow_empty_rows=True)
    return source.masks_for(grid, num_keys)  # type: ignore[attr-defined]


# The kernel's own functions


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
    """mit-han-lab's `block_sparse_attn_func`, same signature and semantics, on any device and dtype.

    q                (total_q, H, D); k, v (total_k, G, D) with H a multiple of G
    cu_seqlens_*     (batch + 1,) int32
    head_mask_type   (H,) int32, streaming_info (2 * H,) int32 or None: see `HeadMasks`
    base_blockmask   (batch or 1, S, ceil(max_seqlen_q_ / 128), ceil(max_seqlen_k_ / 128)) bool, or None
    is_causal        bottom-right aligned; exact_streaming (causal only) counts sinks and windows in tokens

    Tokens are taken in the order they come. A query that sees nothing gives 0 and LSE +inf. Returns out (total_q, H, D),
    or with return_attn_probs (out, lse (batch, H, max_seqlen_q_) float32 without gradient, S_dmask). S_dmask is empty without
    dropout; with it (batch, H, queries, keys), lengths rounded up to whole blocks: probabilities before dropout, negative
    where they were dropped. The kernel's own is in the order of its registers, and comes so from `kernel`.
    """
    return _varlen(
        q,
        k,
        v,
        (cu_seqlens_q, cu_seqlens_k),
        (head_mask_type, streaming_info, base_blockmask),
        (max_seqlen_q_, max_seqlen_k_),
        p_dropout,
        deterministic,
        softmax_scale,
        is_causal,
        exact_streaming,
        return_attn_probs,
    )


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
    """mit-han-lab's `block_streaming_attn_func`: dense and streaming heads, windows in blocks. See `block_sparse_attn_func`."""
    return _varlen(
        q,
        k,
        v,
        (cu_seqlens_q, cu_seqlens_k),
        (head_mask_type, streaming_info, None),
        (max_seqlen_q_, max_seqlen_k_),
        p_dropout,
        deterministic,
        softmax_scale,
        is_causal,
        False,
        return_attn_probs,
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
    """mit-han-lab's `token_streaming_attn_func`: causal, windows in tokens. See `block_sparse_attn_func`."""
    return _varlen(
        q,
        k,
        v,
        (cu_seqlens_q, cu_seqlens_k),
        (head_mask_type, streaming_info, None),
        (max_seqlen_q_, max_seqlen_k_),
        0.0,
        deterministic,
        softmax_scale,
        True,
        True,
        return_attn_probs,
    )


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],
    longest: tuple[int, int],
    dropout_p: float,
    deterministic: bool,
    scale: float | None,
    is_causal: bool,
    exact_streaming: bool,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    head_mask_type = masks[0]
    heads = head_mask_type.numel() if isinstance(head_mask_type, Tensor) else None
    check_tensors(q, k, v, 3, "(total, H, D)", heads)
    check_numbers(dropout_p, scale)
    check_varlen(q, k, cu_seqlens, masks, longest, is_causal, exact_streaming)
    result = _run(
        masks,
        *(x.transpose(0, 1)[None] for x in (q, k, v)),  # (1, H, T, D)
        scale=scale,
        dropout_p=dropout_p,
        cu_seqlens=cu_seqlens,
        longest=longest,
        is_causal=is_causal,
        exact_streaming=exact_streaming,
        deterministic=deterministic,
        return_lse=return_attn_probs,
        return_probs=return_attn_probs and dropout_p > 0,
    )
    out = result.out[0].transpose(0, 1)  # (T, H, D)
    if not return_attn_probs:
        return out
    assert result.lse is not None
    return out, result.lse.detach().float(), q.new_empty(0) if result.probs is None else result.probs.detach()

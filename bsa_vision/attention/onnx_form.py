"""Export block-sparse attention to ONNX, as dense attention with a mask over tokens."""

from __future__ import annotations

import warnings
from weakref import WeakSet

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from bsa_vision.attention.backends.problem import Call
from bsa_vision.attention.carried_masks import is_symbolic, outside_of_tracing
from bsa_vision.attention.mask_source import MaskSource
from bsa_vision.attention.token_order import key_places
from bsa_vision.errors import BackendUnavailable
from bsa_vision.masks import TokenLayout


def is_exporting_onnx() -> bool:
    """Return whether a call is recorded for ONNX.

    Raises BackendUnavailable for the exporter that is based on torch.jit.trace.
    """
    if not torch.onnx.is_in_onnx_export():
        return False
    if torch.jit.is_tracing():
        raise BackendUnavailable(
            "torch.onnx.export(dynamo=False) cannot export sparse heads: pass dynamo=True, or call "
            "restore_(model) first to export the dense model."
        )
    return True


def masked_dense(call: Call, source: MaskSource) -> Tensor:
    """Return attention of (B, H, N, D) tensors in model order, from masked N x N logits.

    Values in skipped blocks have no effect, even if they are not finite. A query without keys
    gives 0; a query that attends to a value that is not finite gives NaN.
    """
    grid, scale = (call.grid_h, call.grid_w), call.scale
    q, k, v, *terms = (x for x in call[:5] if x is not None)
    if is_symbolic(grid) or not all(isinstance(n, int) for n in (q.shape[2], k.shape[2])):
        raise BackendUnavailable(
            "ONNX export of sparse heads needs a fixed image size: height and width are dynamic; "
            "remove them from dynamic_shapes. The batch may be dynamic."
        )
    _warn_once()
    with outside_of_tracing():
        masks = source.masks_for(grid, k.shape[2])
        blocks = masks.block_mask(q.shape[2], k.shape[2]).clone()  # (B or 1, H, R, C)
        row_of, column_of = (
            _block_of(layout, tokens, masks.block_size)
            for layout, tokens in ((masks.layout, q.shape[2]), (masks.kv_layout, k.shape[2]))
        )
        places = None
        if terms and masks.kv_layout is not None:
            row, column = key_places(masks.kv_layout, False, torch.device("cpu"))
            places = (row.clone(), column.clone())
    rows = blocks.to(q.device)[:, :, row_of.to(q.device)]
    mask = rows[:, :, :, column_of.to(q.device)]  # (B or 1, H, N, M)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    logits = (q * scale) @ k.transpose(-1, -2)
    if places is not None:
        for term, place in zip(terms, places, strict=True):
            logits = logits + term[..., place.to(q.device)]
    logits = logits.masked_fill(~mask, -torch.inf)
    has_keys = (logits > -torch.inf).any(-1, keepdim=True) | logits.isnan().any(-1, keepdim=True)
    probs = logits.masked_fill(~has_keys, 0).softmax(-1).masked_fill(~has_keys, 0)
    bad = ~torch.isfinite(v)
    meets_bad = mask.to(v.dtype) @ bad.any(-1, keepdim=True).to(v.dtype) > 0  # (B, H, N, 1)
    return (probs @ v.masked_fill(bad, 0)).masked_fill(meets_bad & has_keys, torch.nan)


def _block_of(layout: TokenLayout | None, tokens: int, block_size: int) -> Tensor:
    """Return the block of each token in model order, (N,) int64."""
    position = torch.arange(tokens) if layout is None else layout.inverse
    return position // block_size


_warned: WeakSet[object] = WeakSet()


def _warn_once() -> None:
    """Warn once per export."""
    tracer = get_proxy_mode()
    if tracer is None or tracer in _warned:
        return
    _warned.add(tracer)
    warnings.warn(
        "bsa_vision: ONNX has no block-sparse attention, so sparse heads are exported as dense "
        "attention with the mask applied: the result is the same, but no blocks are skipped, and "
        "time and memory are N x N.",
        stacklevel=2,
    )

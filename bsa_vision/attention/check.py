"""Diagnose attention calls: report errors, and reasons why sparsity would gain nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from bsa_vision.attention.arguments import check_fit, check_tensors, check_varlen
from bsa_vision.attention.backends import kernel
from bsa_vision.attention.backends.problem import check_bounds
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.masks import TokenLayout

# Rules of thumb: below these limits a fused dense kernel is usually as fast as a sparse one. The
# sparsity is the kernel's published break-even (13 to 20 %, docs/backends.md).
FEW_TOKENS = 1024
LITTLE_SPARSITY = 0.2


@dataclass(frozen=True)
class Finding:
    """One finding of `check`.

    level  "error": the call fails or computes something unintended; "slow": it works but gains
           nothing; "note": it is correct if the message describes what you intend
    topic  short fixed name for use in programs
    """

    level: str
    topic: str
    message: str

    def __str__(self) -> str:
        return f"[{self.level}] {self.message}"


@dataclass(frozen=True)
class CheckReport:
    """All findings of `check`; print it, or test `ok`."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True if there are only notes: the call is correct and can be faster than dense."""
        return all(finding.level == "note" for finding in self.findings)

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(finding.topic for finding in self.findings)

    def __str__(self) -> str:
        summary = ["ok: no problems found, blocks will be skipped"] if self.ok else []
        return "\n".join([*summary, *map(str, self.findings)])


def check(
    q: Tensor,
    k: Tensor,
    head_masks: HeadMasks | Tensor | None,
    *,
    head_mask_type: Tensor | None = None,
    streaming_info: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> CheckReport:
    """Check a call before making it.

    Reads the values of masks and lengths, which synchronises: do not use it in a forward pass.

    q, k         (B, H, N, D) for `sparse_attention`, or packed (total, H, D) with cu_seqlens for
                 `block_sparse_attn_func`
    head_masks   a HeadMasks, or a base_blockmask with head_mask_type and streaming_info

        >>> print(bsa.check(q, k, hm))
    """
    findings: list[Finding] = []

    def attempt(topic: str, action: Callable[[], Value]) -> Value | None:
        """Return the result of `action`; on an error, add a finding and return None."""
        try:
            return action()
        except (ValueError, TypeError) as error:
            findings.append(Finding("error", topic, str(error)))
            return None

    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or q.dim() not in (3, 4):
        raise TypeError(
            f"q is a {type(q).__name__}, k a {type(k).__name__}: expected tensors (B, H, N, D), or "
            "packed (total, H, D)."
        )
    packed = q.dim() == 3
    expected = "(total, H, D)" if packed else "(B, H, N, D)"
    heads = head_masks.num_heads if isinstance(head_masks, HeadMasks) else None
    attempt("tensors", lambda: check_tensors(q, k, k, q.dim(), expected, heads))
    if q.is_nested or k.is_nested:
        return CheckReport(tuple(findings))
    max_seqlens: tuple[int | None, int | None] = (q.shape[-2], k.shape[-2])
    if packed:
        max_seqlens = (
            attempt("boundaries", lambda: _max_seqlen("q", q, cu_seqlens_q, max_seqlen_q)),
            attempt("boundaries", lambda: _max_seqlen("k", k, cu_seqlens_k, max_seqlen_k)),
        )
    masks = head_masks
    if not isinstance(masks, HeadMasks):
        masks = attempt("mask", lambda: HeadMasks(head_masks, head_mask_type, streaming_info))  # type: ignore[arg-type]
    if masks is not None and packed and None not in (cu_seqlens_q, cu_seqlens_k, *max_seqlens):
        raw = (masks.head_mask_type, masks.streaming_info, masks.base_blockmask)
        bounds = (cu_seqlens_q, cu_seqlens_k)
        attempt("mask", lambda: check_varlen(q, k, bounds, raw, max_seqlens, False, False))  # type: ignore[arg-type]
    elif masks is not None and not packed and not findings:
        attempt("mask", lambda: check_fit(q, k, masks, None))
    valid = not findings
    findings += _device_findings(q)
    if masks is not None:
        findings += _gain_findings(masks, max_seqlens, valid)
        findings += _order_findings(masks, packed)
    return CheckReport(tuple(findings))


Value = TypeVar("Value")


def _max_seqlen(name: str, x: Tensor, bounds: Tensor | None, max_seqlen: int | None) -> int:
    """Return the tokens of the longest sequence; raise if `bounds` are wrong."""
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or len(bounds) < 2:
        raise TypeError(
            f"{name} is packed, (total, H, D), and cu_seqlens_{name} is {bounds!r}: without "
            "(batch + 1,) boundaries every image would attend to every other; pass the cumulative "
            "sequence lengths with a 0 in front."
        )
    if bounds.dtype != torch.int32:
        raise TypeError(
            f"cu_seqlens_{name} is {bounds.dtype}: expected torch.int32; use .to(torch.int32)."
        )
    most = int(bounds.diff().max()) if max_seqlen is None else max_seqlen
    check_bounds(name, bounds, x.shape[0], most)
    return most


def _device_findings(q: Tensor) -> Iterator[Finding]:
    if q.device.type != "cuda" or torch.version.hip:
        return
    if q.dtype not in (torch.float16, torch.bfloat16):
        message = (
            f"q is {q.dtype} on CUDA: block-sparse GPU kernels take float16 or bfloat16 only; "
            "convert it, or use torch.autocast."
        )
        yield Finding("slow", "dtype", message)
    if q.shape[-1] > kernel.HEAD_DIMS[-1]:
        message = (
            f"head dim {q.shape[-1]} > 128: the block-sparse kernel does not support it, another "
            "backend will be used."
        )
        yield Finding("slow", "head-dim", message)


def _order_findings(masks: HeadMasks, packed: bool) -> Iterator[Finding]:
    """Check that tokens come in the order that the masks were made for, if it is known."""
    base, made_for = masks.base_blockmask, masks.made_for
    if base is None or bool(base.all()):
        return  # the order of the tokens does not matter
    layout, kv_layout = masks.layout, masks.kv_layout
    given = None if layout is None or kv_layout is None else (layout, kv_layout)
    if packed:  # packed calls ignore layouts: tokens are in packed order already
        given, made_for = None, made_for or given
    if made_for is None and given is None:
        message = (
            "tokens are used in the order given (raster): correct for masks made in that order; "
            'masks made in another, e.g. order="tile", need '
        )
        message += PACK if packed else f"{LAYOUT} makes both."
        yield Finding("note", "order", message)
    elif made_for is not None and not all(map(_same_order, made_for, given or (None, None))):
        order = "the order given" if given is None else f"the order of {given[0]}"
        message = (
            f"the masks were made for {made_for[0]}, but tokens are used in {order}, which "
            "computes a different function; pass "
        )
        message += PACK if packed else f"the masks' {LAYOUT} always passes it."
        yield Finding("note" if packed else "error", "order", message)


LAYOUT = "layout= to HeadMasks; HeadMasks.from_patterns(layout, patterns)"
PACK = "tokens in that order, bsa.pack(q, layout).tokens."


def _same_order(made_for: TokenLayout, layout: TokenLayout | None) -> bool:
    """Return whether two layouts put the tokens in the same order; None is model order."""
    if layout is None:
        return made_for.is_identity
    if made_for.num_tokens != layout.num_tokens:
        return True  # not comparable; another finding reports the sizes
    return all(map(torch.equal, made_for.coordinates, layout.coordinates))


def _gain_findings(
    masks: HeadMasks, max_seqlens: tuple[int | None, int | None], valid: bool
) -> Iterator[Finding]:
    base, tokens = masks.base_blockmask, max((n for n in max_seqlens if n is not None), default=0)
    if base is not None:
        sparse = [(head, kind - 1) for head, kind in enumerate(masks.slices) if kind > 0]
        full = [head for head, index in sparse if bool(base[:, index].all())]
        if full:
            message = (
                f"every block of heads {full} is True, so nothing is skipped there: check the "
                "pattern's radius or sparsity, or use dense heads (head_mask_type 0)."
            )
            yield Finding("slow", "all-true", message)
    if 0 < tokens < FEW_TOKENS:
        message = (
            f"{tokens} tokens: below about {FEW_TOKENS}, attention is too small a part of the "
            "model's time for sparsity to gain much; keep it dense, or raise the resolution."
        )
        yield Finding("slow", "few-tokens", message)
    if valid and None not in max_seqlens:
        kept = masks.block_mask(*max_seqlens).float().mean().item()  # type: ignore[arg-type]
        if 1 - kept < LITTLE_SPARSITY:
            message = (
                f"{1 - kept:.0%} of the blocks are skipped: below about {LITTLE_SPARSITY:.0%}, "
                "fused dense GPU kernels are at least as fast; use sparser patterns or dense heads."
            )
            yield Finding("slow", "little-sparsity", message)

"""The troubleshooting list as code: what is wrong with a call, or why no gain is to be expected from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsa_vision.arguments import check_bounds
from bsa_vision.backends import kernel
from bsa_vision.head_masks import HeadMasks

# From these on, sparsity can pay at all; below, a fused dense kernel is done before blocks are sorted out. The sparsity
# is where the kernel's own published curves cross dense attention (docs/backends.md).
FEW_TOKENS = 1024
LITTLE_SPARSITY = 0.2


@dataclass(frozen=True)
class Finding:
    """One thing `check` found.

    level  "error": the call fails or computes something else than meant; "slow": it works and gains nothing
    topic  a short fixed name, for programs
    """

    level: str
    topic: str
    message: str

    def __str__(self) -> str:
        return f"[{self.level}] {self.message}"


@dataclass(frozen=True)
class CheckReport:
    """All findings; `print` it, or ask `ok`."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """No finding at all: the call is right and can gain."""
        return not self.findings

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(finding.topic for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "nothing wrong found, and blocks to skip"


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
    """Look a call over before making it; reads the values of masks and lengths, so not for use in a forward.

    q, k         (B, H, N, D) for `sparse_attention`, or packed (total, H, D) with cu_seqlens for `block_sparse_attn_func`
    head_masks   a HeadMasks, or a bare base_blockmask (with head_mask_type and streaming_info beside it)

        >>> print(bsa.check(q, k, hm))
    """
    findings: list[Finding] = []

    def found(level: str, topic: str, message: str) -> None:
        findings.append(Finding(level, topic, message))

    packed = q.dim() == 3
    longest = [max_seqlen_q, max_seqlen_k]
    if packed:
        for axis, (name, x, bounds) in enumerate((("q", q, cu_seqlens_q), ("k", k, cu_seqlens_k))):
            longest[axis] = _check_sequences(found, name, x, bounds, longest[axis])
    else:
        longest = [q.shape[2], k.shape[2]]
    masks = _as_head_masks(found, head_masks, head_mask_type, streaming_info)
    if masks is not None:
        _check_masks(found, q.shape[1], None if packed else q.shape[0], masks, longest)
    _check_device(found, q)
    _check_gain(found, masks, longest)
    return CheckReport(tuple(findings))


Found = Callable[[str, str, str], None]


def _check_sequences(found: Found, name: str, x: Tensor, bounds: Tensor | None, longest: int | None) -> int | None:
    if bounds is None:
        found(
            "error",
            "boundaries",
            f"{name} is packed, (total, H, D), but cu_seqlens_{name} is missing: every image would see every other; pass the "
            "cumulative sequence lengths with a 0 in front.",
        )
        return longest
    if bounds.dtype != torch.int32:
        found(
            "error", "boundaries", f"cu_seqlens_{name} is {bounds.dtype}: expected torch.int32; use .to(torch.int32)."
        )
    lengths = bounds.diff().tolist()
    most = max(lengths) if longest is None else longest
    try:
        check_bounds(name, bounds, x.shape[0], most)
    except ValueError as error:
        found("error", "boundaries", str(error))
    return most


def _as_head_masks(
    found: Found, masks: Any, head_mask_type: Tensor | None, streaming_info: Tensor | None
) -> HeadMasks | None:
    if isinstance(masks, HeadMasks):
        return masks
    try:
        return HeadMasks(masks, head_mask_type, streaming_info)
    except (ValueError, TypeError) as error:
        found("error", "mask", str(error))
        return None


def _check_masks(found: Found, heads: int, images: int | None, masks: HeadMasks, longest: list[int | None]) -> None:
    if heads != masks.num_heads:
        found(
            "error", "mask", f"q has {heads} heads, the masks {masks.num_heads}: they must be equal; rebuild the masks."
        )
    base = masks.base_blockmask
    if base is None:
        return
    if images is not None and base.shape[0] not in (1, images):
        found("error", "mask", f"q has {images} images, base_blockmask {base.shape[0]}: allowed are 1 or as many.")
    for name, tokens, blocks in zip(("q", "k"), longest, base.shape[2:], strict=True):
        if tokens is not None and blocks != -(-tokens // masks.block_size):
            found(
                "error",
                "mask",
                f"{tokens} tokens of {name} are {-(-tokens // masks.block_size)} blocks of {masks.block_size}, base_blockmask "
                f"{tuple(base.shape)} has {blocks}: make it for this many tokens, special tokens included.",
            )
    if base.numel() and bool(base.all()):
        found(
            "slow",
            "all-true",
            "every block of base_blockmask is True, so nothing is skipped: check the pattern's radius or sparsity, or use dense "
            "heads (head_mask_type 0).",
        )


def _check_device(found: Found, q: Tensor) -> None:
    if q.device.type == "cuda" and q.dtype not in (torch.float16, torch.bfloat16):
        found(
            "slow",
            "dtype",
            f"q is {q.dtype} on CUDA: block-sparse GPU kernels take float16 or bfloat16 only; convert, or use torch.autocast.",
        )
    if q.device.type == "cuda" and q.shape[-1] > kernel.HEAD_DIMS[-1]:
        found(
            "slow",
            "head-dim",
            f"head dim {q.shape[-1]} > 128: the block-sparse kernel cannot run it, another backend will.",
        )


def _check_gain(found: Found, masks: HeadMasks | None, longest: list[int | None]) -> None:
    tokens = max((n for n in longest if n is not None), default=0)
    if 0 < tokens < FEW_TOKENS:
        found(
            "slow",
            "few-tokens",
            f"{tokens} tokens: below about {FEW_TOKENS} attention is too small a part of the work for skipped blocks to show; "
            "keep it dense, or raise the resolution.",
        )
    sparsity = next(_known_sparsity(masks), None)
    if sparsity is not None and sparsity < LITTLE_SPARSITY:
        found(
            "slow",
            "little-sparsity",
            f"{sparsity:.0%} of the blocks are skipped: below about {LITTLE_SPARSITY:.0%} a fused dense kernel is at least as "
            "fast; use sparser patterns or dense heads.",
        )


def _known_sparsity(masks: HeadMasks | None) -> Iterator[float]:
    if masks is not None and (masks.num_blocks is not None or masks.all_dense):
        yield masks.sparsity

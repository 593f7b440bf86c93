"""The troubleshooting list as code: what is wrong with a call, or why no gain is to be expected from it."""

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

# Below these, sparsity cannot be expected to pay: a fused dense kernel is done before blocks are sorted out. The sparsity is
# the kernel's own published break-even (13 to 20 %, docs/backends.md); both are rules of thumb, to be measured in earnest.
FEW_TOKENS = 1024
LITTLE_SPARSITY = 0.2


@dataclass(frozen=True)
class Finding:
    """One thing `check` found.

    level  "error": the call fails or computes something else than meant; "slow": it works and gains nothing; "note": right,
           if what it says is meant
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
        """No finding but notes: the call is right and can gain."""
        return all(finding.level == "note" for finding in self.findings)

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(finding.topic for finding in self.findings)

    def __str__(self) -> str:
        good = ["nothing wrong found, and blocks to skip"] if self.ok else []
        return "\n".join([*good, *map(str, self.findings)])


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

    def attempt(topic: str, action: Callable[[], Value]) -> Value | None:
        """The result of `action`, or None and an error on the list."""
        try:
            return action()
        except (ValueError, TypeError) as error:
            findings.append(Finding("error", topic, str(error)))
            return None

    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or q.dim() not in (3, 4):
        raise TypeError(
            f"q is a {type(q).__name__}, k a {type(k).__name__}: expected tensors (B, H, N, D), or packed (total, H, D)."
        )
    packed = q.dim() == 3
    expected = "(total, H, D)" if packed else "(B, H, N, D)"
    heads = head_masks.num_heads if isinstance(head_masks, HeadMasks) else None
    attempt("tensors", lambda: check_tensors(q, k, k, q.dim(), expected, heads))
    if q.is_nested or k.is_nested:
        return CheckReport(tuple(findings))
    longest: tuple[int | None, int | None] = (q.shape[-2], k.shape[-2])
    if packed:
        longest = (
            attempt("boundaries", lambda: _longest("q", q, cu_seqlens_q, max_seqlen_q)),
            attempt("boundaries", lambda: _longest("k", k, cu_seqlens_k, max_seqlen_k)),
        )
    masks = head_masks
    if not isinstance(masks, HeadMasks):
        masks = attempt("mask", lambda: HeadMasks(head_masks, head_mask_type, streaming_info))  # type: ignore[arg-type]
    if masks is not None and packed and None not in (cu_seqlens_q, cu_seqlens_k, *longest):
        raw = (masks.head_mask_type, masks.streaming_info, masks.base_blockmask)
        bounds = (cu_seqlens_q, cu_seqlens_k)
        attempt("mask", lambda: check_varlen(q, k, bounds, raw, longest, False, False))  # type: ignore[arg-type]
    elif masks is not None and not packed and not findings:
        attempt("mask", lambda: check_fit(q, k, masks, None))
    right = not findings
    findings += _device_findings(q)
    if masks is not None:
        findings += _gain_findings(masks, longest, right)
        findings += _order_findings(masks, packed)
    return CheckReport(tuple(findings))


Value = TypeVar("Value")


def _longest(name: str, x: Tensor, bounds: Tensor | None, longest: int | None) -> int:
    """Tokens of the longest sequence, after a look at the boundaries."""
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or len(bounds) < 2:
        raise TypeError(
            f"{name} is packed, (total, H, D), and cu_seqlens_{name} is {bounds!r}: without (batch + 1,) boundaries every image "
            "would see every other; pass the cumulative sequence lengths with a 0 in front."
        )
    if bounds.dtype != torch.int32:
        raise TypeError(
            f"cu_seqlens_{name} is {bounds.dtype}: expected torch.int32; use .to(torch.int32)."
        )
    most = int(bounds.diff().max()) if longest is None else longest
    check_bounds(name, bounds, x.shape[0], most)
    return most


def _device_findings(q: Tensor) -> Iterator[Finding]:
    if q.device.type != "cuda" or torch.version.hip:
        return
    if q.dtype not in (torch.float16, torch.bfloat16):
        yield Finding(
            "slow",
            "dtype",
            f"q is {q.dtype} on CUDA: block-sparse GPU kernels take float16 or bfloat16 only; convert, or use torch.autocast.",
        )
    if q.shape[-1] > kernel.HEAD_DIMS[-1]:
        yield Finding(
            "slow",
            "head-dim",
            f"head dim {q.shape[-1]} > 128: the block-sparse kernel cannot run it, another backend will.",
        )


def _order_findings(masks: HeadMasks, packed: bool) -> Iterator[Finding]:
    """Whether tokens are taken in the order that the masks were made for, as far as that is known."""
    base, known = masks.base_blockmask, masks.made_for
    given = (
        None if masks.layout is None or masks.kv_layout is None else (masks.layout, masks.kv_layout)
    )
    if base is None or bool(base.all()):
        return  # whatever the order, every token sees every other
    if packed:  # layouts do not count here
        given, known = None, known or given
    if known is None and given is None:
        yield Finding(
            "note",
            "order",
            "tokens are taken as they come (raster): right for masks made in that order; those made in another, say "
            'order="tile", need ' + (PACK if packed else f"{LAYOUT} makes both."),
        )
    elif known is not None and not all(map(_same_places, known, given or (None, None))):
        taken = "as they come" if given is None else f"in the order of {given[0]}"
        yield Finding(
            "note" if packed else "error",
            "order",
            f"the masks were made for {known[0]}, tokens are taken {taken}: that is another function; pass "
            + (PACK if packed else f"the masks' own {LAYOUT} cannot forget it."),
        )


LAYOUT = "layout= to HeadMasks; HeadMasks.from_patterns(layout, patterns)"
PACK = "tokens in that order, bsa.pack(q, layout).tokens."


def _same_places(made_for: TokenLayout, taken: TokenLayout | None) -> bool:
    """Whether packed tokens lie where the masks have them. Without a layout they come in model order."""
    if taken is None:
        return made_for.is_identity
    if made_for.num_tokens != taken.num_tokens:
        return True  # not to be compared; the sizes are another finding
    return all(map(torch.equal, made_for.coordinates, taken.coordinates))


def _gain_findings(
    masks: HeadMasks, longest: tuple[int | None, int | None], right: bool
) -> Iterator[Finding]:
    base, tokens = masks.base_blockmask, max((n for n in longest if n is not None), default=0)
    if base is not None:
        full = [
            head
            for head, kind in enumerate(masks.slices)
            if kind > 0 and bool(base[:, kind - 1].all())
        ]
        if full:
            yield Finding(
                "slow",
                "all-true",
                f"every block of heads {full} is True, so nothing is skipped there: check the pattern's radius or sparsity, or use "
                "dense heads (head_mask_type 0).",
            )
    if 0 < tokens < FEW_TOKENS:
        yield Finding(
            "slow",
            "few-tokens",
            f"{tokens} tokens: below about {FEW_TOKENS} attention is too small a part of the work for skipped blocks to show; "
            "keep it dense, or raise the resolution.",
        )
    if right and None not in longest:
        kept = masks.block_mask(*longest).float().mean().item()  # type: ignore[arg-type]
        if 1 - kept < LITTLE_SPARSITY:
            yield Finding(
                "slow",
                "little-sparsity",
                f"{1 - kept:.0%} of the blocks are skipped: below about {LITTLE_SPARSITY:.0%} little is gained, and fused dense GPU "
                "kernels are at least as fast; use sparser patterns or dense heads.",
            )

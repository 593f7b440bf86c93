"""Attention modules that stay dense in a swapped model, and the reasons `describe` reports."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from bsa_vision.adapters.swap.sparse_layer import layer_of
from bsa_vision.adapters.swap.wrappers import own_class

DECODER = "one side has about 7 tokens, less than one block: there is nothing to skip"
CLIP = "DeepSeek-OCR's CLIP tower has at most 401 tokens: too few for sparsity to pay off"
POOL = "a pooling head has one query: there is nothing to skip"
INSIDE = "its attention is not a separate module"
DIFFERENTIAL = "it subtracts one softmax from another"
BIASED = "it adds a bias for every pair of tokens"
WINDOWS = "it attends within windows, which are too small to skip blocks"
HIERA = f"{WINDOWS}, or pools its queries"
MEMORY = "memory attention needs its own plan: pass it to sparsify_ by itself"
SUPPORTED = "supported, but not swapped: pass it to sparsify_ by itself"
ELSEWHERE = (
    "its class is supported only inside the encoders named below; if a wrapper changed the "
    "encoder, call sparsify_ before wrapping"
)
UNKNOWN = "unsupported attention class"

# Module and class, as regular expressions -> reason.
REASONS: tuple[tuple[str, str, str], ...] = (
    (r"^sam2\.|\.(sam2|sam3_tracker)_video\.", r"RoPEAttention$", MEMORY),
    (r"^(segment_anything|sam2)\..*\.transformer$", r"Attention$", DECODER),
    (
        r"^transformers\.models\.(sam|sam_hq|sam2|sam2_video|sam3_tracker_video)\.",
        r"^Sam(HQ|2|2Video|3TrackerVideo)?Attention$",
        DECODER,
    ),
    (r"(^|\.)(hieradet|hieradet_sam2|sam2\.modeling_sam2)$", r"MultiScaleAttention$", HIERA),
    (r"(^|\.)(deepencoder|clip_sdpa)$", r"^NoTPAttention$", CLIP),
    (r"^timm\.", r"^AttentionPool", POOL),
    (r"^timm\.", r"^(ParallelScaling|DiffParallelScaling|ParallelThings)Block$", INSIDE),
    (r"^timm\.", r"^DiffAttention$", DIFFERENTIAL),
    (r"^timm\.models\.(beit|vision_transformer_relpos)$", r"Attention$", BIASED),
    (r"^timm\.models\.swin", r"^WindowAttention$", WINDOWS),
)


@dataclass(frozen=True)
class LeftDense:
    """Attention modules of one class that stay dense."""

    where: str
    kind: str
    count: int
    reason: str

    def __str__(self) -> str:
        return f"left dense: {self.where or 'model'}, {self.count} x {self.kind}: {self.reason}"


def left_dense(
    model: nn.Module,
    described: Collection[nn.Module] = (),
    is_supported: Callable[[nn.Module], bool] = lambda module: False,
    supported_reason: str = SUPPORTED,
) -> tuple[LeftDense, ...]:
    """Return the attention modules of `model` that are neither swapped nor `described`.

    They are grouped by class and reason. Modules for which `is_supported` is true get
    `supported_reason`.
    """
    known = set(described)
    names: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if not _is_attention(module) or module in known:
            continue
        # Wrappers around attention match too; only the innermost module counts.
        inner = (_is_attention(x) for x in module.modules() if x is not module)
        if layer_of(module) is None and not any(inner):
            cls = own_class(type(module))
            reason = _reason(cls.__module__, cls.__name__)
            if reason == UNKNOWN and is_supported(module):
                reason = supported_reason
            names.setdefault((cls.__name__, reason), []).append(name)
    return tuple(
        LeftDense(common_path(paths), kind, len(paths), reason)
        for (kind, reason), paths in names.items()
    )


def _is_attention(module: nn.Module) -> bool:
    library, kind = type(module).__module__, type(module).__name__
    return _reason(library, kind) != UNKNOWN or (
        "attention" in kind.lower() and "block" not in kind.lower()
    )


def _reason(library: str, kind: str) -> str:
    for modules, kinds, reason in REASONS:
        if re.search(modules, library) and re.search(kinds, kind):
            return reason
    return UNKNOWN


def common_path(names: list[str]) -> str:
    """Return the longest module path that all `names` share."""
    first, last = min(names).split("."), max(names).split(".")
    return ".".join(
        part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last))
    )

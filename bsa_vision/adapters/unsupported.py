"""Attention that stays as it is in a swapped model, and why: what `describe` says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from bsa_vision.adapters.swap.sparse_layer import layer_of
from bsa_vision.adapters.swap.wrappers import own_class

DECODER = "one side of it has about 7 tokens, less than one block: nothing could be skipped"
CLIP = "DeepSeek-OCR's CLIP tower has at most 401 tokens: too few to gain anything"
POOL = "a pooling head has one query: nothing could be skipped"
INSIDE = "its attention is not a module of its own"
DIFFERENTIAL = "it subtracts one softmax from another"
BIASED = "it adds a bias for every pair of tokens"
WINDOWS = "it attends within windows, which are too small to skip anything in"
HIERA = "it attends within windows, which are too small to skip anything in, or pools its queries"
MEMORY = "memory attention takes a plan of its own: pass it to sparsify_ by itself"
SERVED = "served, but not swapped: pass it to sparsify_ by itself"
ELSEWHERE = "its class is served in the encoders named below; this is none of them, or a wrapper changed it: then sparsify_ first"
UNKNOWN = "not a class this version serves"

# Module and class, as regular expressions -> why.
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
    """Attention modules of one class that keep their own, dense attention."""

    where: str
    kind: str
    count: int
    reason: str

    def __str__(self) -> str:
        return f"left dense: {self.where or 'model'}, {self.count} x {self.kind}: {self.reason}"


def left_dense(
    model: nn.Module,
    described: Collection[nn.Module] = (),
    serves: Callable[[nn.Module], bool] = lambda module: False,
    served: str = SERVED,
) -> tuple[LeftDense, ...]:
    """Every attention module of `model` that is neither swapped nor `described`, by class; `serves` knows which ones could be.

    served  what is said of those
    """
    known = set(described)
    names: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if not _is_attention(module) or module in known:
            continue
        # A wrapper that holds attention is none itself.
        if layer_of(module) is None and not any(
            _is_attention(x) for x in module.modules() if x is not module
        ):
            own = own_class(type(module))
            kind, reason = own.__name__, _reason(own.__module__, own.__name__)
            names.setdefault(
                (kind, served if reason == UNKNOWN and serves(module) else reason), []
            ).append(name)
    return tuple(
        LeftDense(common_path(where), kind, len(where), reason)
        for (kind, reason), where in names.items()
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
    """The module path that all `names` lie in."""
    first, last = min(names).split("."), max(names).split(".")
    return ".".join(
        part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last))
    )

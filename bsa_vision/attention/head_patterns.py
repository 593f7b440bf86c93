"""Convert the pattern of one head (`Pattern`, name, function or mask) to a block mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bsa_vision.masks import PATTERNS, Pattern, TokenLayout
from bsa_vision.masks.patterns import Box

# layout -> (R, C) bool; (layout, kv_layout) -> (R, C) if keys are not the queries' tokens
BlockMaskFn = Callable[..., Tensor]
HeadPattern = Pattern | BlockMaskFn | Tensor | str
Images = Sequence[Sequence[Box]]  # boxes of the prompts of each image


def per_head(patterns: HeadPattern | Sequence[HeadPattern], heads: int | None) -> list[HeadPattern]:
    """Return one pattern per head, from a list or from a single pattern for all `heads`."""
    if isinstance(patterns, Tensor):
        single = patterns.dim() <= 2
    else:
        single = isinstance(patterns, (str, Pattern)) or callable(patterns)
    if single:
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ValueError(
                f"heads={heads!r} with one pattern for all heads: expected their number, e.g. "
                "heads=12, or a list with one pattern per head."
            )
        return [patterns] * heads  # type: ignore[list-item]
    if not isinstance(patterns, (Sequence, Tensor)) or len(patterns) == 0:
        raise TypeError(
            f"patterns={patterns!r}: expected a pattern, or a list with one per head, e.g. "
            "['dense', masks.Pattern('local_window', radius=8)]."
        )
    if heads is not None and heads != len(patterns):
        raise ValueError(
            f"{len(patterns)} patterns for heads={heads}: expected one per head, or one pattern "
            "for all."
        )
    return list(patterns)


def blocks_of(
    pattern: HeadPattern,
    head: int,
    layout: TokenLayout,
    keys: TokenLayout | None,
    boxes: Images | None,
    stream: int,
) -> Tensor | None:
    """Return the mask of one head, (images, R, C) bool on the CPU; None for "dense"."""
    if isinstance(pattern, str):
        if pattern == "dense":
            return None
        pattern = Pattern(pattern)
    if isinstance(pattern, Pattern):
        if boxes is None and pattern.is_dynamic:
            raise ValueError(
                f"head {head}: {pattern!r} follows the prompts of each image, and boxes is None: "
                "pass one list of (top, left, bottom, right) boxes in patches per image."
            )
        return torch.stack([pattern(layout, stream, b, keys) for b in _checked_boxes(boxes)])
    if isinstance(pattern, Tensor):
        images = pattern if pattern.dim() == 3 else pattern[None]
        text = f"the mask of head {head} is"
        return torch.stack([check_blocks(mask, text, layout, keys) for mask in images])
    if not callable(pattern):
        raise TypeError(
            f"the pattern of head {head} is a {type(pattern).__name__}: expected 'dense', a name "
            f"({', '.join(PATTERNS)}), a masks.Pattern, a function layout -> (R, C) bool, or an "
            "(R, C) bool mask."
        )
    mask = pattern(layout) if keys is None else pattern(layout, keys)
    checked = check_blocks(mask, f"the function of head {head} returned", layout, keys)
    return with_special(checked, layout, keys)[None]


def with_special(mask: Tensor, layout: TokenLayout, keys: TokenLayout | None) -> Tensor:
    """Return `mask` with the rows and columns of blocks that hold special tokens set."""
    return mask | layout.special_blocks[:, None] | (keys or layout).special_blocks[None]


def check_blocks(mask: Any, text: str, layout: TokenLayout, keys: TokenLayout | None) -> Tensor:
    """Return `mask` on the CPU; raise ValueError unless it is a block mask for these layouts.

    text  begins the error message
    """
    expected = (layout.num_blocks, (keys or layout).num_blocks)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != expected:
        got = type(mask).__name__
        if isinstance(mask, Tensor):
            got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(
            f"{text} {got}: expected torch.bool of shape {expected}, one entry per pair of blocks "
            f"of {layout}."
        )
    return mask.cpu()


def _checked_boxes(boxes: Images | None) -> Images:
    if boxes is None:
        return ((),)
    for image in boxes:
        if not isinstance(image, Sequence) or not all(
            isinstance(box, Sequence) and len(box) == 4 for box in image
        ):
            raise ValueError(
                f"boxes={boxes!r}: expected one list of (top, left, bottom, right) boxes per "
                "image, e.g. [[(3, 4, 3, 4)]] for a click in one image."
            )
    return boxes

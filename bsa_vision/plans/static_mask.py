"""Block masks as patterns of a plan, each valid for exactly one layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bsa_vision.attention.head_masks import HeadMasks, instead_of_masks
from bsa_vision.attention.mask_tensors import DENSE, other_block_size
from bsa_vision.errors import PlanError
from bsa_vision.masks import TokenLayout
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec


class Static:
    """Pattern that returns a given (R, C) bool block mask, valid for one layout only."""

    def __init__(self, mask: Tensor, layout: TokenLayout) -> None:
        mask = mask.detach().cpu()
        wanted = (layout.num_blocks,) * 2
        if mask.dtype != torch.bool or tuple(mask.shape) != wanted:
            raise PlanError(
                f"static mask is {mask.dtype} of shape {tuple(mask.shape)}: expected torch.bool of "
                f"shape {wanted} for {layout}."
            )
        self.mask, self.layout = mask.clone(), layout

    def __call__(self, layout: TokenLayout) -> Tensor:
        if layout != self.layout:
            raise PlanError(
                f"this block mask was made for {self.layout}, but the model runs "
                f"{layout}: a static mask fits one layout only; use a geometric pattern, or make "
                "the plan for this image size."
            )
        return self.mask

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Static)
            and self.layout == other.layout
            and torch.equal(self.mask, other.mask)
        )

    def __hash__(self) -> int:
        return hash((self.layout, self.mask.numpy().tobytes()))

    def __repr__(self) -> str:
        return f"static({1 - self.mask.float().mean().item():.0%} sparse, {self.layout})"


def static_heads(
    layer: LayerSpec, masks: HeadMasks, layout: TokenLayout
) -> list[tuple[str, Static | None]]:
    """Return (pattern name, static mask) of each head; None instead of a mask for a dense head."""
    if masks.num_heads != layer.heads:
        raise PlanError(
            f"layer {layer.name!r} has {layer.heads} heads, but its HeadMasks have "
            f"{masks.num_heads}: expected one mask per head."
        )
    if masks.kv_layout != masks.layout:
        raise PlanError(
            f"layer {layer.name!r}: its HeadMasks have different layouts for queries and keys; "
            "self-attention needs the same layout for both."
        )
    if masks.num_blocks is not None and masks.num_blocks != (layout.num_blocks,) * 2:
        size = other_block_size(masks.num_blocks, layout.block_size, (layout.num_tokens,) * 2)
        hint = f"if their blocks have {size} tokens, pass block_size={size} to HeadMasks; else "
        raise PlanError(
            f"layer {layer.name!r}: its HeadMasks have {masks.num_blocks} blocks, but {layout} has "
            f"{layout.num_blocks}: {hint if size else ''}make them for this image size and its "
            "special tokens, or pass inspect(model, image_size=...)."
        )
    blocks = masks.block_mask(layout.num_tokens, layout.num_tokens)  # (B or 1, H, R, C)
    if not (blocks == blocks[:1]).all():
        raise PlanError(
            f"layer {layer.name!r}: its masks differ across the batch, but a plan has one mask per "
            "head; select the masks of one image."
        )
    return [
        ("dense", None)
        if kind == DENSE
        else (f"{layer.key}/{head}", Static(blocks[0, head], layout))
        for head, kind in enumerate(masks.slices)
    ]


def static_layers(
    spec: ModelSpec, head_masks: Mapping[str, HeadMasks]
) -> tuple[dict[str, Static], dict[str, tuple[str, ...]], TokenLayout]:
    """Return the patterns and layers of a plan with these masks, and their layout.

    head_masks  {layer key or module path: HeadMasks}
    """
    if not isinstance(head_masks, Mapping):
        raise TypeError(
            f"head_masks is a {type(head_masks).__name__}: expected {{layer name: HeadMasks}}."
        )
    if not head_masks:
        raise PlanError(
            "from_head_masks got no masks: expected at least one layer, {layer name: HeadMasks}."
        )
    patterns: dict[str, Static] = {}
    layers = {layer.key: ("dense",) * layer.heads for layer in spec.layers}
    layouts = {}
    for name, masks in head_masks.items():
        layer = spec.find(name)
        if not isinstance(masks, HeadMasks):
            raise TypeError(
                f"layer {name!r} has a {type(masks).__name__}: expected HeadMasks; "
                f"{instead_of_masks(masks)}."
            )
        layout = masks.layout or TokenLayout(
            spec.grid,
            num_prefix_tokens=spec.num_prefix_tokens,
            num_suffix_tokens=spec.num_suffix_tokens,
            block_size=masks.block_size,
        )
        made_for = masks.made_for
        if masks.layout is None and made_for is not None and not made_for[0].is_identity:
            raise PlanError(
                f"layer {layer.name!r}: its masks were made for {made_for[0]}, but its HeadMasks "
                "have no layout; pass layout= to HeadMasks, or use HeadMasks.from_patterns."
            )
        names = static_heads(layer, masks, layout)
        patterns.update({key: pattern for key, pattern in names if pattern is not None})
        layers[layer.key] = tuple(key for key, _ in names)
        layouts[layer.name] = layout
    first = next(iter(layouts.values()))
    for name, layout in layouts.items():
        same = ("order", "tile", "block_size")
        if any(getattr(layout, key) != getattr(first, key) for key in same):
            raise PlanError(
                f"layer {name!r} has {layout}, others have {first}: all layers of a plan share one "
                "order, tile and block size."
            )
    return patterns, layers, first

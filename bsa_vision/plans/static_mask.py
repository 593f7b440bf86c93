"""Block masks made elsewhere, as patterns of a plan: each valid for the one layout it was made for."""

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
    """A block mask as a pattern: the (R, C) bool mask as it is, valid for the one layout it was made for."""

    def __init__(self, mask: Tensor, layout: TokenLayout) -> None:
        mask = mask.detach().cpu()
        if mask.dtype != torch.bool or tuple(mask.shape) != (layout.num_blocks,) * 2:
            raise PlanError(
                f"static mask is {mask.dtype} of shape {tuple(mask.shape)}: expected torch.bool of shape "
                f"{(layout.num_blocks,) * 2} for {layout}; make it for this layout."
            )
        self.mask, self.layout = mask.clone(), layout

    def __call__(self, layout: TokenLayout) -> Tensor:
        if layout != self.layout:
            raise PlanError(
                f"this block mask was made for {self.layout}, the model runs {layout}: a static mask fits one layout only; use a "
                "geometric pattern, or make the plan for this image size."
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
    """(pattern name, static mask or None = dense) of each head."""
    if masks.num_heads != layer.heads:
        raise PlanError(
            f"layer {layer.name!r} has {layer.heads} heads, its HeadMasks {masks.num_heads}: they must be equal."
        )
    if masks.kv_layout != masks.layout:
        raise PlanError(
            f"layer {layer.name!r}: its HeadMasks have other keys than queries, self-attention has one layout."
        )
    if masks.num_blocks is not None and masks.num_blocks != (layout.num_blocks,) * 2:
        size = other_block_size(masks.num_blocks, layout.block_size, (layout.num_tokens,) * 2)
        other = (
            f"if their blocks are of {size} tokens, pass block_size={size} to HeadMasks; else "
            if size
            else ""
        )
        raise PlanError(
            f"layer {layer.name!r}: its HeadMasks have {masks.num_blocks} blocks, {layout} has {layout.num_blocks}: {other}make "
            "them for this image size and its special tokens, or pass inspect(model, image_size=...)."
        )
    blocks = masks.block_mask(layout.num_tokens, layout.num_tokens)  # (B or 1, H, R, C)
    if not (blocks == blocks[:1]).all():
        raise PlanError(
            f"layer {layer.name!r}: its masks differ across the batch, a plan has one mask per head; index one image."
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
    """Return the patterns and layers of a plan with these masks, by layer, and their layout."""
    if not isinstance(head_masks, Mapping):
        raise TypeError(
            f"head_masks is a {type(head_masks).__name__}: expected {{layer name: HeadMasks}}; name the layer each is for."
        )
    if not head_masks:
        raise PlanError("from_head_masks got no masks: give at least one, {layer name: HeadMasks}.")
    patterns: dict[str, Static] = {}
    layers = {layer.key: ("dense",) * layer.heads for layer in spec.layers}
    layouts = {}
    for name, masks in head_masks.items():
        layer = spec.find(name)
        if not isinstance(masks, HeadMasks):
            raise TypeError(
                f"layer {name!r} has a {type(masks).__name__}: expected HeadMasks; {instead_of_masks(masks)}."
            )
        layout = masks.layout or TokenLayout(
            spec.grid,
            num_prefix_tokens=spec.num_prefix_tokens,
            num_suffix_tokens=spec.num_suffix_tokens,
            block_size=masks.block_size,
        )
        if (
            masks.layout is None
            and masks.made_for is not None
            and not masks.made_for[0].is_identity
        ):
            raise PlanError(
                f"layer {layer.name!r}: its masks were made for {masks.made_for[0]}, its HeadMasks has no layout; pass layout= to "
                "HeadMasks, or make them with HeadMasks.from_patterns."
            )
        names = static_heads(layer, masks, layout)
        patterns.update({key: pattern for key, pattern in names if pattern is not None})
        layers[layer.key] = tuple(key for key, _ in names)
        layouts[layer.name] = layout
    first = next(iter(layouts.values()))
    for name, layout in layouts.items():
        if (layout.order, layout.tile, layout.block_size) != (
            first.order,
            first.tile,
            first.block_size,
        ):
            raise PlanError(
                f"layer {name!r} has {layout}, others {first}: one plan has one order and block size; rebuild one."
            )
    return patterns, layers, first

"""Block masks made elsewhere, as patterns of a plan: each valid for the one layout it was made for."""

from __future__ import annotations

import torch
from torch import Tensor

from bsa_vision.attention.head_masks import DENSE, HeadMasks, other_block_size
from bsa_vision.errors import PlanError
from bsa_vision.masks import TokenLayout
from bsa_vision.plans.model_spec import LayerSpec


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

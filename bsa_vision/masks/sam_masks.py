"""Block mask generators for Segment Anything: image tokens in raster order, then prompt tokens.

    python masks/sam_masks.py        draws each mask

The image grid is square unless `grid` is given. All return (B, S, R, C) bool masks, True = compute,
for tokens in model order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bsa_vision.masks.layout import TokenLayout, whole_number, whole_pair
from bsa_vision.masks.origin import remember
from bsa_vision.masks.pattern import stack_heads
from bsa_vision.masks.patterns import dense, local_window, nearest_among, region
from bsa_vision.masks.sparsity import keep_highest
from bsa_vision.masks.special_tokens import keep_special, special
from bsa_vision.masks.vit_masks import Device, hybrid, show

Grid = tuple[int, int] | None


def _sam_layout(
    num_image_tokens: int, num_prompt_tokens: int, block_size: int, grid: Grid
) -> TokenLayout:
    num_image_tokens = whole_number("num_image_tokens", num_image_tokens, 1)
    if grid is None:
        side = isqrt(num_image_tokens)
        if side * side != num_image_tokens:
            raise ValueError(
                f"num_image_tokens={num_image_tokens} is not a square, so its grid is unknown: "
                "pass grid=(h, w) with h * w image tokens."
            )
        grid = (side, side)
    height, width = whole_pair("grid", grid, 1)
    if height * width != num_image_tokens:
        raise ValueError(
            f"grid=({height}, {width}) has {height * width} patches, "
            f"num_image_tokens={num_image_tokens}: they must be equal."
        )
    return TokenLayout(
        (height, width),
        num_suffix_tokens=whole_number("num_prompt_tokens", num_prompt_tokens, 0),
        block_size=block_size,
    )


def generate_sam_image_to_prompt_mask(
    num_image_tokens: int,
    num_prompt_tokens: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    sparse_image_to_image: bool = True,
    image_sparsity: float = 0.5,
    device: Device = None,
    *,
    grid: Grid = None,
) -> Tensor:
    """Keep all blocks with prompts, and the k nearest image blocks of each image block.

    A block with any prompt token is a prompt block; its row and column are kept. Among the image
    blocks, k = max(1, round((1 - image_sparsity) * image blocks)), so `image_sparsity` is realised
    exactly there. sparse_image_to_image=False keeps everything. Returns (B, num_heads, R, R) bool.
    """
    layout = _sam_layout(num_image_tokens, num_prompt_tokens, block_size, grid)
    mask = dense(layout)
    if sparse_image_to_image:
        image_blocks = (~layout.special_blocks).nonzero().squeeze(1)
        mask = keep_special(layout, nearest_among(layout, image_blocks, image_sparsity))
        remember(mask, (layout, layout))
    return stack_heads([mask] * whole_number("num_heads", num_heads, 1), batch_size, device)


def generate_sam_hierarchical_mask(
    num_image_tokens: int,
    num_prompt_tokens: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    device: Device = None,
    *,
    grid: Grid = None,
) -> Tensor:
    """Keep local windows that grow with the index of the head.

    Head i keeps blocks with a pair of patches at L1 distance <= 1 + i * g // num_heads, where g is
    the longer grid side (any-rule). Returns (B, num_heads, R, R) bool.
    """
    layout = _sam_layout(num_image_tokens, num_prompt_tokens, block_size, grid)
    g, num_heads = max(layout.grid), whole_number("num_heads", num_heads, 1)
    masks = [local_window(layout, 1 + i * g // num_heads, "l1") for i in range(num_heads)]
    return stack_heads(masks, batch_size, device)


def generate_sam_region_focused_mask(
    num_image_tokens: int,
    num_prompt_tokens: int,
    prompt_positions: Sequence[Any],
    block_size: int,
    batch_size: int,
    num_heads: int,
    focus_radius: int = 8,
    device: Device = None,
    *,
    grid: Grid = None,
) -> Tensor:
    """Keep pairs of patches at L1 distance <= 2, and pairs that are both near a prompt (any-rule).

    prompt_positions  (row, column) in patches, one list for the batch, or one list per image
    focus_radius      patches within this L1 distance of a position are near a prompt

    Returns (B, num_heads, R, R) bool, one mask per image if positions are given per image.
    """
    layout = _sam_layout(num_image_tokens, num_prompt_tokens, block_size, grid)
    num_heads, local = whole_number("num_heads", num_heads, 1), local_window(layout, 2, "l1")
    per_image = _positions_per_image(prompt_positions, whole_number("batch_size", batch_size, 1))
    images = [
        stack_heads([local | region(layout, positions, focus_radius)] * num_heads, 1, device)
        for positions in per_image
    ]
    return remember(torch.cat(images), (layout, layout))


def _positions_per_image(positions: Any, batch_size: int) -> list[list[tuple[int, int]]]:
    if hasattr(positions, "tolist"):  # tensors and arrays
        positions = positions.tolist()
    if not isinstance(positions, Sequence) or not all(
        isinstance(entry, Sequence) for entry in positions
    ):
        raise ValueError(
            f"prompt_positions={positions!r}: expected (row, column) pairs, or one list of pairs "
            "per image; wrap a single position as [(row, column)]."
        )
    if all(
        len(entry) == 2 and all(isinstance(value, Real) for value in entry) for entry in positions
    ):
        return [list(positions)] * batch_size
    if len(positions) != batch_size:
        raise ValueError(
            f"prompt_positions has lists for {len(positions)} images, batch_size={batch_size}: "
            "expected one list of (row, column) for the whole batch, or one per image."
        )
    return [list(image) for image in positions]


def generate_sam_hybrid_encoder_mask(
    num_image_tokens: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    num_dense_heads: int = 4,
    sparsity: float = 0.6,
    device: Device = None,
    *,
    grid: Grid = None,
) -> tuple[Tensor, Tensor]:
    """Keep dense heads first; the others keep their nearest blocks, in the encoder's global layers.

    There are no special tokens. Returns base_blockmask (B, num_heads - num_dense_heads, R, R) bool
    and head_mask_type (num_heads,) int32.
    """
    layout = _sam_layout(num_image_tokens, 0, block_size, grid)
    return hybrid(
        layout, batch_size, num_heads, "num_dense_heads", num_dense_heads, sparsity, device
    )


def generate_sam_cross_attention_mask(
    num_decoder_tokens: int,
    num_encoder_tokens: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    encoder_sparsity: float = 0.5,
    device: Device = None,
    *,
    seed: int = 0,
) -> Tensor:
    """Keep k random encoder blocks per row of decoder blocks, for cross attention.

    k = max(1, round((1 - encoder_sparsity) * C)). Each head has its own draw from `seed`, on the
    CPU; torch's global generators are not used. Returns (B, num_heads, R, C) bool, decoder blocks
    by encoder blocks.
    """
    block_size = whole_number("block_size", block_size, 1)
    num_heads = whole_number("num_heads", num_heads, 1)
    rows = -(-whole_number("num_decoder_tokens", num_decoder_tokens, 1) // block_size)
    columns = -(-whole_number("num_encoder_tokens", num_encoder_tokens, 1) // block_size)
    generator = torch.Generator(device="cpu").manual_seed(whole_number("seed", seed, 0) % 2**63)
    shape = (num_heads, rows, columns)
    score = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
    return stack_heads(keep_highest(score, encoder_sparsity), batch_size, device)


def main() -> None:
    image = (1024, 5, 128, 1, 4)  # 32 x 32 image tokens and 5 prompt tokens in blocks of 128
    base, head_mask_type = generate_sam_hybrid_encoder_mask(1024, 128, 1, 4, num_dense_heads=1)
    show("image to prompt", generate_sam_image_to_prompt_mask(*image))
    show("hierarchical", generate_sam_hierarchical_mask(*image)[:, :2])
    focused = generate_sam_region_focused_mask(1024, 5, [(8, 8)], 128, 1, 4, 4)
    show("region focused, click at (8, 8)", focused)
    show(f"hybrid encoder, head_mask_type {head_mask_type.tolist()}", base)
    show("cross attention", generate_sam_cross_attention_mask(300, 4096, 128, 1, 4))
    mask = special(TokenLayout((32, 32), num_suffix_tokens=5))
    show("special tokens only, for comparison", mask[None, None])


if __name__ == "__main__":
    main()

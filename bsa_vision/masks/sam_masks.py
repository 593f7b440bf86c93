"""Block masks for Segment Anything: a square (or given) grid of image tokens in raster order, prompt tokens after it.

    python masks/sam_masks.py        draws each of them

All return a (B, S, R, C) bool tensor, True = compute, for tokens as the model has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bsa_vision.masks.geometry import dense, local_window, nearest_among, region
from bsa_vision.masks.layout import TokenLayout, whole_number, whole_pair
from bsa_vision.masks.origin import remember
from bsa_vision.masks.patterns import stack_heads
from bsa_vision.masks.sparsity import keep_highest
from bsa_vision.masks.special_tokens import special
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
                f"num_image_tokens={num_image_tokens} is not a square, so its grid cannot be told: pass grid=(h, w) with "
                "h * w image tokens."
            )
        grid = (side, side)
    height, width = whole_pair("grid", grid, 1)
    if height * width != num_image_tokens:
        raise ValueError(
            f"grid=({height}, {width}) holds {height * width} patches, num_image_tokens={num_image_tokens}: they must be equal; "
            "correct one of them."
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
    """Prompts see all and are seen by all; image blocks keep their nearest image blocks.

    A block holding any prompt token is a prompt block, kept as row and column. The others keep the k nearest image
    blocks, k = max(1, round((1 - image_sparsity) * image blocks)), so the sparsity asked for is the sparsity realised.
    sparse_image_to_image=False keeps everything. Returns (B, num_heads, R, R) bool.
    """
    layout = _sam_layout(num_image_tokens, num_prompt_tokens, block_size, grid)
    mask = dense(layout)
    if sparse_image_to_image:
        image_blocks = (~layout.special_blocks).nonzero().squeeze(1)
        prompts = layout.special_blocks
        mask = (
            nearest_among(layout, image_blocks, image_sparsity) | prompts[:, None] | prompts[None]
        )
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
    """Wider with every head: head i keeps blocks with a pair of patches at L1 distance <= 1 + i * g // num_heads, g the
    longer grid side (any-rule). Returns (B, num_heads, R, R) bool.
    """
    layout = _sam_layout(num_image_tokens, num_prompt_tokens, block_size, grid)
    g, num_heads = max(layout.grid), whole_number("num_heads", num_heads, 1)
    return stack_heads(
        [local_window(layout, 1 + i * g // num_heads, "l1") for i in range(num_heads)],
        batch_size,
        device,
    )


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
    """Every query sees L1 <= 2; queries near a prompt also see all keys near a prompt (any-rule).

    prompt_positions  (row, column) in patches, one list for the batch, or one list per image
    focus_radius      a patch within this L1 distance of a position is in focus

    Returns (B, num_heads, R, R) bool, which differs across the batch when the positions do.
    """
    layout = _sam_layout(num_image_tokens, num_prompt_tokens, block_size, grid)
    num_heads, local = whole_number("num_heads", num_heads, 1), local_window(layout, 2, "l1")
    images = [
        stack_heads([local | region(layout, positions, focus_radius)] * num_heads, 1, device)
        for positions in _positions_per_image(
            prompt_positions, whole_number("batch_size", batch_size, 1)
        )
    ]
    return remember(torch.cat(images), (layout, layout))


def _positions_per_image(positions: Any, batch_size: int) -> list[list[tuple[int, int]]]:
    if hasattr(positions, "tolist"):  # tensors and arrays
        positions = positions.tolist()
    if not isinstance(positions, Sequence) or not all(
        isinstance(entry, Sequence) for entry in positions
    ):
        raise ValueError(
            f"prompt_positions={positions!r}: expected (row, column) pairs, or one list of pairs per image; wrap a single "
            "position as [(row, column)]."
        )
    if all(
        len(entry) == 2 and all(isinstance(value, Real) for value in entry) for entry in positions
    ):
        return [list(positions)] * batch_size
    if len(positions) != batch_size:
        raise ValueError(
            f"prompt_positions holds lists for {len(positions)} images, batch_size={batch_size}: give one list of "
            "(row, column) for the whole batch, or one such list per image."
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
    """Some heads dense, the others see their nearest blocks; no special tokens. For the encoder's global layers.

    Returns (base_blockmask (B, num_heads - num_dense_heads, R, R) bool, head_mask_type (num_heads,) int32).
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
    """Decoder queries on encoder keys: k = max(1, round((1 - encoder_sparsity) * C)) random key blocks a row.

    Drawn on the CPU from `seed`, anew for every head; torch's global generators are left alone.
    Returns (B, num_heads, R, C) bool, R blocks of decoder tokens by C blocks of encoder tokens.
    """
    block_size, num_heads = (
        whole_number("block_size", block_size, 1),
        whole_number("num_heads", num_heads, 1),
    )
    rows = -(-whole_number("num_decoder_tokens", num_decoder_tokens, 1) // block_size)
    columns = -(-whole_number("num_encoder_tokens", num_encoder_tokens, 1) // block_size)
    generator = torch.Generator(device="cpu").manual_seed(whole_number("seed", seed, 0) % 2**63)
    score = torch.rand(
        num_heads, rows, columns, generator=generator, device="cpu", dtype=torch.float32
    )
    return stack_heads(keep_highest(score, encoder_sparsity), batch_size, device)


def main() -> None:
    image = (1024, 5, 128, 1, 4)  # 32 x 32 image tokens and 5 prompt tokens in blocks of 128
    base, head_mask_type = generate_sam_hybrid_encoder_mask(1024, 128, 1, 4, num_dense_heads=1)
    show("image to prompt", generate_sam_image_to_prompt_mask(*image))
    show("hierarchical", generate_sam_hierarchical_mask(*image)[:, :2])
    show(
        "region focused, click at (8, 8)",
        generate_sam_region_focused_mask(1024, 5, [(8, 8)], 128, 1, 4, 4),
    )
    show(f"hybrid encoder, head_mask_type {head_mask_type.tolist()}", base)
    show("cross attention", generate_sam_cross_attention_mask(300, 4096, 128, 1, 4))
    show(
        "special tokens only, for comparison",
        special(TokenLayout((32, 32), num_suffix_tokens=5))[None, None],
    )


if __name__ == "__main__":
    main()

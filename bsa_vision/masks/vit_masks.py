"""Block masks for plain vision transformers: raster order, a CLS token in front where the model has one.

    python masks/vit_masks.py        draws each of them

All return a (B, S, R, C) bool tensor, True = compute, equal across the batch, for tokens as the model has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from bsa_vision.masks.drawing import draw
from bsa_vision.masks.geometry import dense, local_window, nearest, random_blocks, strided
from bsa_vision.masks.layout import TokenLayout, whole_number, whole_pair
from bsa_vision.masks.origin import remember
from bsa_vision.masks.patterns import stack_heads

Size = int | Sequence[int]
Device = torch.device | str | None


def _vit_layout(
    img_size: Size, patch_size: int, block_size: int, include_cls_token: bool
) -> TokenLayout:
    square = isinstance(img_size, Integral)
    height, width = whole_pair("img_size", (img_size, img_size) if square else img_size, 1)
    if not isinstance(include_cls_token, bool):
        raise ValueError(
            f"include_cls_token={include_cls_token!r}: allowed are True and False; pass one of them."
        )
    patch_size = whole_number("patch_size", patch_size, 1)
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"img_size=({height}, {width}) is not a whole number of patches of {patch_size} pixels: both sides must divide; "
            f"resize or pad the image to ({-(-height // patch_size) * patch_size}, {-(-width // patch_size) * patch_size})."
        )
    grid = (height // patch_size, width // patch_size)
    return TokenLayout(grid, num_prefix_tokens=int(include_cls_token), block_size=block_size)


def generate_vit_spatial_locality_mask(
    img_size: Size,
    patch_size: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    locality_radius: int = 1,
    include_cls_token: bool = True,
    device: Device = None,
) -> Tensor:
    """Neighbours only: blocks with a pair of patches at L1 distance <= 2 * locality_radius (any-rule).

    img_size in pixels, an int or (height, width); returns (B, num_heads, R, R) bool.
    """
    layout = _vit_layout(img_size, patch_size, block_size, include_cls_token)
    mask = local_window(layout, 2 * whole_number("locality_radius", locality_radius, 0), "l1")
    return stack_heads([mask] * whole_number("num_heads", num_heads, 1), batch_size, device)


def generate_vit_random_sparse_mask(
    img_size: Size,
    patch_size: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    sparsity: float = 0.5,
    include_cls_token: bool = True,
    device: Device = None,
    *,
    seed: int = 0,
) -> Tensor:
    """k = max(1, round((1 - sparsity) * C)) random blocks a row, its own among them; each head draws anew.

    Drawn on the CPU from `seed`; torch's global generators are left alone. Returns (B, num_heads, R, R) bool.
    """
    layout = _vit_layout(img_size, patch_size, block_size, include_cls_token)
    heads = range(whole_number("num_heads", num_heads, 1))
    return stack_heads(
        [random_blocks(layout, sparsity, seed, head) for head in heads], batch_size, device
    )


def generate_vit_strided_mask(
    img_size: Size,
    patch_size: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    stride: int = 2,
    include_cls_token: bool = True,
    device: Device = None,
) -> Tensor:
    """Block columns 0, stride, 2 * stride, ... for every query. Returns (B, num_heads, R, R) bool."""
    mask = strided(_vit_layout(img_size, patch_size, block_size, include_cls_token), stride)
    return stack_heads([mask] * whole_number("num_heads", num_heads, 1), batch_size, device)


def generate_vit_hybrid_mask(
    img_size: Size,
    patch_size: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    num_global_heads: int = 4,
    sparsity: float = 0.5,
    include_cls_token: bool = True,
    device: Device = None,
) -> tuple[Tensor, Tensor]:
    """Some heads dense, the others see their nearest blocks, k = max(1, round((1 - sparsity) * C)) a row.

    Returns (base_blockmask (B, num_heads - num_global_heads, R, R) bool of the sparse heads,
    head_mask_type (num_heads,) int32: the dense heads first, 0, then 1).
    """
    layout = _vit_layout(img_size, patch_size, block_size, include_cls_token)
    return hybrid(
        layout, batch_size, num_heads, "num_global_heads", num_global_heads, sparsity, device
    )


def hybrid(
    layout: TokenLayout,
    batch_size: int,
    num_heads: int,
    dense_name: str,
    num_dense: int,
    sparsity: float,
    device: Device,
) -> tuple[Tensor, Tensor]:
    """(base_blockmask, head_mask_type) of `num_dense` dense heads followed by nearest-block heads."""
    num_heads, num_dense = (
        whole_number("num_heads", num_heads, 1),
        whole_number(dense_name, num_dense, 0),
    )
    if num_dense > num_heads:
        raise ValueError(
            f"{dense_name}={num_dense} is more than num_heads={num_heads}: allowed are 0 to {num_heads}; lower {dense_name}."
        )
    mask = nearest(layout, sparsity)
    base = stack_heads([mask] * num_heads, batch_size, device)[:, num_dense:].contiguous()
    remember(base, (layout, layout))
    return base, torch.tensor(
        [0] * num_dense + [1] * (num_heads - num_dense), dtype=torch.int32, device=base.device
    )


def generate_vit_multiscale_mask(
    img_size: Size,
    patch_size: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    include_cls_token: bool = True,
    device: Device = None,
) -> Tensor:
    """From neighbours in the first head to the whole image in the last: head i keeps blocks with a pair of patches at
    L1 distance <= 2 * (1 + i * (g - 1) // (num_heads - 1)), g the longer grid side; a single head: 2 * g.

    Returns (B, num_heads, R, R) bool.
    """
    layout = _vit_layout(img_size, patch_size, block_size, include_cls_token)
    g, num_heads = max(layout.grid), whole_number("num_heads", num_heads, 1)
    radii = (
        [2 * g]
        if num_heads == 1
        else [2 * (1 + i * (g - 1) // (num_heads - 1)) for i in range(num_heads)]
    )
    return stack_heads([local_window(layout, radius, "l1") for radius in radii], batch_size, device)


def show(name: str, mask: Tensor) -> None:
    """Print a mask's shape, its sparsity and a drawing of its last head."""
    sparsity = 1 - mask.float().mean().item()
    print(f"{name}: {tuple(mask.shape)}, sparsity {sparsity:.1%}; head {mask.shape[1] - 1}:")
    print(draw(mask[0, -1]) + "\n")


def main() -> None:
    common = (512, 16, 128, 1, 4)  # 32 x 32 patches and CLS in blocks of 128
    base, head_mask_type = generate_vit_hybrid_mask(*common, num_global_heads=1)
    show("spatial locality", generate_vit_spatial_locality_mask(*common))
    show("random sparse", generate_vit_random_sparse_mask(*common))
    show("strided", generate_vit_strided_mask(*common))
    show(f"hybrid, head_mask_type {head_mask_type.tolist()}", base)
    show("multiscale", generate_vit_multiscale_mask(*common)[:, :2])
    show("dense, for comparison", dense(TokenLayout((32, 32), num_prefix_tokens=1))[None, None])


if __name__ == "__main__":
    main()

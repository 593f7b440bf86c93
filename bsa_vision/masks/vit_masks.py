"""Block mask generators for plain vision transformers, in raster order with an optional CLS token.

    python masks/vit_masks.py        draws each mask

All return (B, S, R, C) bool masks, True = compute, the same for all images of the batch, for tokens
in model order.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from bsa_vision.masks.drawing import draw
from bsa_vision.masks.layout import TokenLayout, whole_number, whole_pair
from bsa_vision.masks.origin import remember
from bsa_vision.masks.pattern import stack_heads
from bsa_vision.masks.patterns import dense, local_window, nearest, random_blocks, strided

Size = int | Sequence[int]
Device = torch.device | str | None


def _vit_layout(
    img_size: Size, patch_size: int, block_size: int, include_cls_token: bool
) -> TokenLayout:
    square = isinstance(img_size, Integral)
    height, width = whole_pair("img_size", (img_size, img_size) if square else img_size, 1)
    if not isinstance(include_cls_token, bool):
        raise ValueError(f"include_cls_token={include_cls_token!r}: allowed are True and False.")
    patch_size = whole_number("patch_size", patch_size, 1)
    if height % patch_size or width % patch_size:
        padded = tuple(-(-side // patch_size) * patch_size for side in (height, width))
        raise ValueError(
            f"img_size=({height}, {width}): expected multiples of the patch size, {patch_size} "
            f"pixels; resize or pad the image to {padded}."
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
    """Keep blocks with a pair of patches at L1 distance <= 2 * locality_radius (any-rule).

    img_size  pixels, an int or (height, width)

    Returns (B, num_heads, R, R) bool.
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
    """Keep k = max(1, round((1 - sparsity) * C)) random blocks per row, including the diagonal.

    Each head has its own draw from `seed`, on the CPU; torch's global generators are not used.
    Returns (B, num_heads, R, R) bool.
    """
    layout = _vit_layout(img_size, patch_size, block_size, include_cls_token)
    heads = range(whole_number("num_heads", num_heads, 1))
    masks = [random_blocks(layout, sparsity, seed, head) for head in heads]
    return stack_heads(masks, batch_size, device)


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
    """Keep block columns 0, stride, 2 * stride, ... for every query.

    Returns (B, num_heads, R, R) bool.
    """
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
    """Keep dense heads first; the others keep their k nearest blocks per row.

    k = max(1, round((1 - sparsity) * C)). Returns base_blockmask
    (B, num_heads - num_global_heads, R, R) bool of the sparse heads, and head_mask_type
    (num_heads,) int32: 0 for the dense heads, then 1.
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
    """Return base_blockmask and head_mask_type of dense heads followed by nearest-block heads.

    dense_name  name of the argument `num_dense` in the calling function, for errors
    """
    num_heads = whole_number("num_heads", num_heads, 1)
    num_dense = whole_number(dense_name, num_dense, 0)
    if num_dense > num_heads:
        raise ValueError(
            f"{dense_name}={num_dense} is more than num_heads={num_heads}: allowed are 0 to "
            f"{num_heads}."
        )
    mask = nearest(layout, sparsity)
    base = stack_heads([mask] * num_heads, batch_size, device)[:, num_dense:].contiguous()
    remember(base, (layout, layout))
    types = [0] * num_dense + [1] * (num_heads - num_dense)
    return base, torch.tensor(types, dtype=torch.int32, device=base.device)


def generate_vit_multiscale_mask(
    img_size: Size,
    patch_size: int,
    block_size: int,
    batch_size: int,
    num_heads: int,
    include_cls_token: bool = True,
    device: Device = None,
) -> Tensor:
    """Keep local windows that grow from neighbours in the first head to the image in the last.

    Head i keeps blocks with a pair of patches at L1 distance
    <= 2 * (1 + i * (g - 1) // (num_heads - 1)), where g is the longer grid side; a single head uses
    2 * g. Returns (B, num_heads, R, R) bool.
    """
    layout = _vit_layout(img_size, patch_size, block_size, include_cls_token)
    g, num_heads = max(layout.grid), whole_number("num_heads", num_heads, 1)
    radii = [2 * g]
    if num_heads > 1:
        radii = [2 * (1 + i * (g - 1) // (num_heads - 1)) for i in range(num_heads)]
    return stack_heads([local_window(layout, radius, "l1") for radius in radii], batch_size, device)


def show(name: str, mask: Tensor) -> None:
    """Print the shape and sparsity of a mask, and a drawing of its last head."""
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

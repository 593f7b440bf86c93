"""Pack images into one sequence, (B, H, N, D) or a list of (H, n, D) -> (T, H, D), and unpack it.

`unpack` undoes `pack`; `cu_seqlens` holds the boundaries of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.token_order import order_tokens, restore_tokens
from bsa_vision.masks import TokenLayout
from bsa_vision.masks.origin import check_layout


@dataclass(frozen=True, eq=False)
class Packed:
    """Images packed into one sequence, with the data that `unpack` needs.

    tokens      (T, H, D) in packed order, image after image, without padding
    cu_seqlens  (B + 1,) int32 on the tokens' device, boundaries of the images
    max_seqlen  tokens of the longest image
    layouts     one per image; None = tokens in the order given
    uniform     whether the input was one (B, H, N, D) tensor
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    layouts: tuple[TokenLayout | None, ...]
    uniform: bool


def pack(
    x: Tensor | Sequence[Tensor], layouts: TokenLayout | Sequence[TokenLayout | None] | None = None
) -> Packed:
    """Pack (B, H, N, D), or a list of (H, n, D) images of different sizes, into one sequence.

    x        tokens in model order
    layouts  one for all images, or one per image

        >>> packed = pack([torch.randn(12, 77, 64), torch.randn(12, 300, 64)])
        >>> packed.tokens.shape, packed.cu_seqlens.tolist()
        (torch.Size([377, 12, 64]), [0, 77, 377])
    """
    images = list(x)
    if not images or any(
        not isinstance(image, Tensor)
        or image.dim() != 3
        or image.shape[::2] != images[0].shape[::2]
        for image in images
    ):
        shapes = [tuple(getattr(image, "shape", ())) for image in images]
        raise ValueError(
            f"pack got images of shapes {shapes}: expected (B, H, N, D), or a list of (H, n, D) "
            "with the same heads and head dim."
        )
    per_image = list(layouts) if isinstance(layouts, Sequence) else [layouts] * len(images)
    for layout in per_image:
        if layout is not None:
            check_layout("layout", layout)
    if len(per_image) != len(images):
        raise ValueError(
            f"{len(images)} images but {len(per_image)} layouts: expected one layout for all, or "
            "one per image."
        )
    for position, (image, layout) in enumerate(zip(images, per_image, strict=True)):
        if layout is not None and layout.num_tokens != image.shape[1]:
            how = "build the layout from this image's grid and special tokens"
            if layout.num_tokens == image.shape[0]:
                how = "swap heads and tokens, x.transpose(-3, -2)"
            raise ValueError(
                f"image {position} has {image.shape[1]} tokens, its layout {layout.num_tokens}: "
                f"they must be equal; {how}."
            )
    lengths = [image.shape[1] for image in images]
    ordered = [
        rearrange(order_tokens(image, layout), "h n d -> n h d")
        for image, layout in zip(images, per_image, strict=True)
    ]
    bounds = [0, *accumulate(lengths)]
    return Packed(
        tokens=torch.cat(ordered),  # (T, H, D)
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=images[0].device),
        max_seqlen=max(lengths),
        layouts=tuple(per_image),
        uniform=isinstance(x, Tensor),
    )


def unpack(tokens: Tensor, packed: Packed) -> Tensor | list[Tensor]:
    """Return (T, H, D) tokens in the form that was given to `pack`, in model order.

    The result is (B, H, N, D), or a list of (H, n, D).
    """
    if tokens.shape[0] != packed.tokens.shape[0]:
        raise ValueError(
            f"unpack got {tokens.shape[0]} tokens, `packed` holds {packed.tokens.shape[0]}: pass "
            "the attention output for packed.tokens."
        )
    lengths = packed.cu_seqlens.diff().tolist()
    images = [
        restore_tokens(rearrange(image, "n h d -> h n d"), layout)
        for image, layout in zip(tokens.split(lengths), packed.layouts, strict=True)
    ]
    return torch.stack(images) if packed.uniform else images


def pack_head_masks(images: Sequence[HeadMasks]) -> HeadMasks:
    """Combine the masks of images of different sizes into one for the packed batch.

    All images must have the same head types and block size. The result has the size of the longest
    image; shorter ones use the top-left part of their slice. It has no layout, because packed
    tokens are in order already.
    """
    if not images or not all(isinstance(masks, HeadMasks) for masks in images):
        raise TypeError(
            f"pack_head_masks got {images!r}: expected a list of HeadMasks, one per image."
        )
    first = images[0]
    for position, masks in enumerate(images):
        kinds = (masks.slices, masks.streaming, masks.block_size)
        if kinds != (first.slices, first.streaming, first.block_size):
            raise ValueError(
                f"image {position} has head types {masks.slices} in blocks of {masks.block_size}, "
                f"image 0 {first.slices} in blocks of {first.block_size}: all images of one call "
                "must have the same head types."
            )
        base = masks.base_blockmask
        if base is not None and base.shape[0] != 1:
            raise ValueError(
                f"image {position} has a base_blockmask for {base.shape[0]} images: expected one; "
                "index it."
            )
    streaming = [number for pair in first.streaming for number in pair] or None
    used = max(first.slices)
    slices = [m.base_blockmask[:, :used] for m in images if m.base_blockmask is not None]
    base = None
    if slices:
        rows, columns = max(s.shape[2] for s in slices), max(s.shape[3] for s in slices)
        padding = [(0, columns - s.shape[3], 0, rows - s.shape[2]) for s in slices]
        base = torch.cat([F.pad(s, pad) for s, pad in zip(slices, padding)])  # (B, S, R, C)
    # Rows past the end of a short image are empty. All other rows were checked before.
    return HeadMasks(
        base, first.slices, streaming, block_size=first.block_size, allow_empty_rows=True
    )

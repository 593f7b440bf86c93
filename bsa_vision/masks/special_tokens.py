"""Keep what special tokens need: the rows and columns of the blocks that hold one."""

from __future__ import annotations

import torch
from torch import Tensor

from bsa_vision.masks.layout import TokenLayout
from bsa_vision.masks.origin import laid_out


@laid_out
def special(layout: TokenLayout, keys: TokenLayout | None = None) -> Tensor:
    """Only what is always kept: rows and columns of blocks that hold a special token, and each block's own (its own place among `keys`)."""
    if keys is not None:
        return keep_special(layout, layout.block_distance("chebyshev", keys) == 0, keys)
    return keep_special(layout, torch.eye(layout.num_blocks, dtype=torch.bool, device="cpu"))


def keep_special(layout: TokenLayout, mask: Tensor, keys: TokenLayout | None = None) -> Tensor:
    """`mask` with the rows and columns of blocks that hold a special token switched on."""
    return mask | layout.special_blocks[:, None] | (keys or layout).special_blocks[None]

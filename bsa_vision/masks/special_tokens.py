"""Keep the rows and columns of blocks that hold special tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from bsa_vision.masks.layout import TokenLayout
from bsa_vision.masks.origin import laid_out


@laid_out
def special(layout: TokenLayout, keys: TokenLayout | None = None) -> Tensor:
    """Keep the blocks that every pattern keeps: special tokens' rows and columns, and the diagonal.

    With `keys`, the diagonal is all blocks with a patch at the same position.
    """
    if keys is not None:
        return keep_special(layout, layout.block_distance("chebyshev", keys) == 0, keys)
    return keep_special(layout, torch.eye(layout.num_blocks, dtype=torch.bool, device="cpu"))


def keep_special(layout: TokenLayout, mask: Tensor, keys: TokenLayout | None = None) -> Tensor:
    """Return `mask` with the rows and columns of blocks that hold special tokens set."""
    return mask | layout.special_blocks[:, None] | (keys or layout).special_blocks[None]

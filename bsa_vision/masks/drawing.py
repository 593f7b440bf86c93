"""Draw block masks as text."""

from __future__ import annotations

import torch
from torch import Tensor

SHADES = " ░▒▓█"


def draw(mask: Tensor, max_size: int = 32) -> str:
    """Return an (R, C) bool block mask as lines of text, with darker cells for more kept blocks.

    Masks with more than `max_size` rows or columns are averaged down to that size.
    """
    if mask.dim() != 2:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}: expected (R, C); pick one head of one image, "
            "mask[b, s]."
        )
    rows, columns = (min(n, max_size) for n in mask.shape)
    if 0 in (rows, columns):
        return ""
    kept = torch.nn.functional.adaptive_avg_pool2d(mask[None].float().cpu(), (rows, columns))[0]
    shade = (kept * (len(SHADES) - 1)).ceil().long()
    return "\n".join("".join(SHADES[i] * 2 for i in row) for row in shade.tolist())

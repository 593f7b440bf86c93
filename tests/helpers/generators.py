"""What tests of mask generators share: sizes, layouts by brute force, and the comparison."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from tests.helpers.oracles_masks import Blocks, model_order

block_sizes = st.integers(1, 40)
sides = st.tuples(st.integers(1, 12), st.integers(1, 17))
property_test = settings(max_examples=50, deadline=None)


def same(mask: torch.Tensor, heads: list[np.ndarray], batch_size: int = 2) -> bool:
    """Return whether every image of the batch has exactly these heads."""
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert mask.shape[:2] == (batch_size, len(heads))
    return all(
        np.array_equal(head.numpy(), expected)
        for image in mask
        for head, expected in zip(image, heads, strict=True)
    )


def vit(grid, block_size, include_cls_token=True) -> Blocks:
    """Return blocks with a CLS token before the patches."""
    return Blocks(model_order(grid, start=int(include_cls_token)), grid, block_size)


def sam(grid, num_prompt_tokens, block_size) -> Blocks:
    """Return blocks with prompt tokens after the patches."""
    return Blocks(model_order(grid, end=num_prompt_tokens), grid, block_size)

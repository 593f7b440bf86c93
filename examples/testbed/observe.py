"""Attention probabilities and block mass from what `bsa.observe` reports."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bsa_vision.masks import TokenLayout


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Return attention probabilities: (B, H, N, D) and (B, H, M, D) -> (B, H, N, M)."""
    return (q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def block_mass(probs: Tensor, layout: TokenLayout, every: int = 1) -> Tensor:
    """Sum attention over blocks: (B, H, M, N) in model order -> (B, H, R, C).

    The sum over all blocks is M, the number of queries.

    every  `probs` holds every n-th query, starting with the first
    """
    block = layout.inverse // layout.block_size  # (N,) in model order
    member = F.one_hot(block, layout.num_blocks).to(probs)  # (N, R)
    return member[::every].T @ (probs @ member)

"""Attention that `bsa.observe` has seen, as probabilities and as the mass of blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bsa_vision.masks import TokenLayout


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """(B, H, N, D) and (B, H, M, D) -> (B, H, N, M), each row adding up to 1."""
    return (q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def block_mass(probs: Tensor, layout: TokenLayout, every: int = 1) -> Tensor:
    """(B, H, M, N) in model order -> (B, H, R, C): the attention that the queries of each block pay to the keys of each, all adding up to M.

    every  which queries these are: the first one and every so many after it, M in all
    """
    of_token = layout.inverse // layout.block_size  # (N,) in model order
    member = F.one_hot(of_token, layout.num_blocks).to(probs)  # (N, R)
    return member[::every].T @ (probs @ member)

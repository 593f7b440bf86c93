"""Keep a fraction of the blocks of every row."""

from __future__ import annotations

import warnings
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_sparsity(sparsity: Any) -> float:
    """Return `sparsity` as a float; raise ValueError unless it is a fraction from 0 to 1."""
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0.0 <= sparsity <= 1.0:
        percent = number and 1 < sparsity <= 100
        hint = f"; use {float(sparsity) / 100:g} for {sparsity:g} %" if percent else ""
        raise ValueError(
            f"sparsity={sparsity!r}: expected the fraction of blocks to skip, 0 to 1{hint}."
        )
    return float(sparsity)


def num_kept(sparsity: float, num_blocks: int) -> int:
    """Return how many of `num_blocks` blocks a row keeps: max(1, round((1 - sparsity) * C))."""
    skipped = check_sparsity(sparsity)
    if skipped == 1 and num_blocks > 1:
        warnings.warn(
            f"sparsity={sparsity!r} keeps one block of {num_blocks} in each row, the minimum: "
            "sparsity is the fraction to skip; use 0.0 to keep every block.",
            stacklevel=3,
        )
    return max(1, round((1 - skipped) * num_blocks))


def keep_highest(score: Tensor, sparsity: float) -> Tensor:
    """Return a bool mask of the k highest entries in every row of `score` (..., R, C)."""
    kept = score.topk(num_kept(sparsity, score.shape[-1]), dim=-1).indices
    return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(-1, kept, True)

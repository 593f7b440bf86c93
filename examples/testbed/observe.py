"""What the heads of the testbed's model attend to: attention seen while it runs, as probabilities and as the mass of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from examples.testbed.model import Testbed
from masks import TokenLayout

Seen = Callable[[int, Tensor, Tensor], None]  # layer, queries and keys (B, H, N, D), rotated


@contextmanager
def observe(model: Testbed, see: Seen) -> Iterator[None]:
    """Inside, `see` is called by every layer of a model that runs dense, before it attends."""
    blocks = cast(Any, model.encoder.blocks)
    for index, block in enumerate(blocks):
        block.attn.__dict__["attend"] = _seen(block.attn.attend, index, see)
    try:
        yield
    finally:
        for block in blocks:
            del block.attn.__dict__["attend"]


def _seen(attend: Callable[..., Tensor], index: int, see: Seen) -> Callable[..., Tensor]:
    def seen(q: Tensor, k: Tensor, *others: Any) -> Tensor:
        see(index, q, k)
        return attend(q, k, *others)

    return seen


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

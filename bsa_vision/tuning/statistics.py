"""What sparsity would cost in each head, measured on dense runs: streaming over images, additive over images and processes.

Two passes over the calibration images. The first finds where attention goes and what dropping a block would do (`BlockStatistics`); best
blocks are read from it. The second computes what every candidate does to the output of its head (`CandidateErrors`), exactly: with
p the dense probabilities and u_iJ = sum over j in block J of p_ij (v_j - o_i), the output of query i without the blocks D is off by

    o'_i - o_i = -(1 / m_i) sum over J in D of u_iJ,        m_i = the probability that is kept

All vectors are taken after the output projection: v is multiplied by a square root of W_h^T W_h. Nothing is N x N; one block row of all
heads is there at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_vision.adapters import Observation
from bsa_vision.packing import key_places, order_tokens
from masks import TokenLayout


@dataclass
class BlockStatistics:
    """Of one layer, summed over images.

    mass   (H, R, C) attention that the queries of a block pay to the keys of another, mean over the queries
    drop   (H, R, C) squared change of the output when only that block is dropped, before renormalisation, summed over the queries
    """

    mass: Tensor
    drop: Tensor
    images: int = 0

    @classmethod
    def empty(cls, heads: int, layout: TokenLayout) -> BlockStatistics:
        shape = (heads, layout.num_blocks, layout.num_blocks)
        mass, drop = (torch.zeros(shape, dtype=torch.float64, device="cpu") for _ in range(2))
        return cls(mass, drop)

    def add(self, seen: Observation, layout: TokenLayout) -> None:
        """One dense call of this layer."""
        for row, rows in enumerate(_block_rows(seen, layout)):
            self.mass[:, row] += rows.mass.mean(2).sum(0).double().cpu()
            self.drop[:, row] += rows.change.square().sum((2, 4)).sum(0).double().cpu()
        self.images += len(seen.q)


@dataclass
class CandidateErrors:
    """Of one layer, summed over images and queries.

    error  (H, K) squared change of the output of each candidate's head, after the output projection
    kept   (H, K) attention that is kept, mean over queries
    total  squared length of the dense output, heads taken as orthogonal
    """

    error: Tensor
    kept: Tensor
    total: float = 0.0
    images: int = 0

    @classmethod
    def empty(cls, heads: int, candidates: int) -> CandidateErrors:
        error, kept = (torch.zeros(heads, candidates, dtype=torch.float64, device="cpu") for _ in range(2))
        return cls(error, kept)

    def add(self, seen: Observation, layout: TokenLayout, masks: Tensor) -> None:
        """One dense call of this layer; masks (H, K, R, C) bool, True = compute, of every head's candidates."""
        tokens = layout.num_tokens
        for row, rows in enumerate(_block_rows(seen, layout)):
            dropped = (~masks[:, :, row]).to(rows.mass)  # (H, K, C)
            lost = torch.einsum("bhic,hkc->bhki", rows.mass, dropped)
            change = torch.einsum("bhicd,hkc->bhkid", rows.change, dropped)
            kept = (1 - lost).clamp(min=1e-6)
            off = change.square().sum(-1) / kept.square()  # (B, H, K, i)
            self.error += off.sum((0, 3)).double().cpu()
            self.kept += (1 - lost).sum((0, 3)).double().cpu() / tokens
            self.total += float(rows.out.square().sum())
        self.images += len(seen.q)


@dataclass(frozen=True, eq=False)
class _Rows:
    """One block of queries.

    mass    (B, H, i, C) probability of each block of keys
    change  (B, H, i, C, D) u of each block of keys, after the output projection
    out     (B, i, H, D) outputs, after the output projection, head by head
    """

    mass: Tensor
    change: Tensor
    out: Tensor


def _block_rows(seen: Observation, layout: TokenLayout) -> Iterator[_Rows]:
    """The blocks of queries, one after the other."""
    heads = seen.q.shape[1]
    q, k, v = (order_tokens(x.float(), layout) for x in (seen.q, seen.k, seen.v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    v = torch.einsum("bhnd,hde->bhne", v, _metric(seen))
    size, blocks = layout.block_size, layout.num_blocks
    padding = blocks * size - layout.num_tokens
    by_block = F.pad(v, (0, 0, 0, padding)).unflatten(2, (blocks, size))  # (B, H, C, j, D)
    bias = None if seen.rel_pos is None else [order_tokens(term.float(), layout) for term in seen.rel_pos]
    places = key_places(layout, True, q.device)
    for first in range(0, layout.num_tokens, size):
        inside = slice(first, first + size)
        logits = q[:, :, inside] @ k.transpose(-1, -2) * seen.scale  # (B, H, i, N)
        if bias is not None:
            logits += sum(term[:, :, inside].index_select(-1, place) for term, place in zip(bias, places, strict=True))
        probs = logits.softmax(-1)
        out = probs @ v  # (B, H, i, D)
        probs = F.pad(probs, (0, padding)).unflatten(-1, (blocks, size))  # (B, H, i, C, j)
        mass = probs.sum(-1)
        own = torch.einsum("bhicj,bhcjd->bhicd", probs, by_block)
        yield _Rows(mass, own - mass[..., None] * out[..., None, :], out)


def _metric(seen: Observation) -> Tensor:
    """(H, D, D): a square root of W_h^T W_h, so that lengths are those after the output projection; the identity where that is not known."""
    heads, dim = seen.q.shape[1], seen.v.shape[-1]
    if seen.weight is None:
        return torch.eye(dim, device=seen.v.device).expand(heads, -1, -1)
    by_head = seen.weight.float().unflatten(1, (heads, -1)).permute(1, 0, 2)  # (H, C, D)
    values, vectors = torch.linalg.eigh((by_head.transpose(1, 2) @ by_head).double())
    return (vectors * values.clamp(min=0).sqrt()[:, None]).float()

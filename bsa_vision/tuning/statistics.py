"""What sparsity would cost in each head, measured on dense runs: streaming over images, additive over images and processes.

Two passes over the calibration images. The first finds where attention goes and what dropping a block would do (`BlockStatistics`); best
blocks are read from it. The second computes what every candidate does to the output of its head (`CandidateErrors`), exactly: with
p the dense probabilities and u_iJ = sum over j in block J of p_ij (v_j - o_i), the output of query i without the blocks D is off by

    o'_i - o_i = -(1 / m_i) sum over J in D of u_iJ = (1 / m_i) sum over J not in D of u_iJ,    m_i = the probability that is kept

All vectors are taken after the output projection: v is multiplied by a square root of W_h^T W_h. Nothing is N x N; a few block rows of all
heads are there at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_vision.adapters import Observation
from bsa_vision.attention.token_order import key_places, order_tokens
from bsa_vision.masks import TokenLayout

BINS = 100  # of the histograms of kept attention
WORKING_MEMORY = 2 * 2**20  # bytes; one block of queries is worked on in any case

T = TypeVar("T", bound="Sums")


class Sums:
    """float64 tensors on the CPU that add up over images, whoever saw them."""

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def __add__(self: T, other: T) -> T:
        theirs = other.tensors()
        return type(self)(
            **{name: tensor + theirs[name] for name, tensor in self.tensors().items()}
        )


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


@dataclass
class BlockStatistics(Sums):
    """Of one layer, summed over images.

    mass   (H, R, C) attention that the queries of a block pay to the keys of another, mean over the queries
    drop   (H, R, C) squared change of the output when only that block is dropped, before renormalisation, summed over the queries
    gram   (H, R, K, K) products of the changes by two blocks, summed over the queries: the change by several is the sum of all
           products of two of them. For K blocks of each row only, so that it grows with the number of rows, not with its cube
    total  () squared length of the layer's dense output
    """

    mass: Tensor
    drop: Tensor
    gram: Tensor
    total: Tensor

    @classmethod
    def empty(cls, heads: int, layout: TokenLayout, compared: int = 0) -> BlockStatistics:
        """`compared` is K."""
        shape = (heads, layout.num_blocks, layout.num_blocks)
        return cls(_zeros(*shape), _zeros(*shape), _zeros(*shape[:2], compared, compared), _zeros())

    def add(
        self,
        seen: Observation,
        layout: TokenLayout,
        compared: Tensor | None = None,
        total: bool = True,
    ) -> None:
        """One dense call of this layer; `compared` (H, R, K) are the blocks of each row that `gram` is about, `total` may be left out."""
        v = order_tokens(seen.v.float(), layout).repeat_interleave(
            seen.q.shape[1] // seen.v.shape[1], dim=1
        )
        for rows in _block_rows(seen, layout):
            self.mass[:, rows.which] += rows.mass.mean(3).sum(0).double().cpu()
            self.drop[:, rows.which] += rows.change.square().sum((3, 5)).sum(0).double().cpu()
            if total:
                self.total += _energy(rows.probs @ v, seen.weight).double().cpu()
            if compared is not None:
                some = _of_blocks(rows.change, compared[:, rows.which].to(rows.change.device))
                self.gram[:, rows.which] += (
                    torch.einsum("bhrikd,bhrijd->hrkj", some, some).double().cpu()
                )


def _of_blocks(change: Tensor, blocks: Tensor) -> Tensor:
    """(B, H, r, i, C, D) and (H, r, K) -> (B, H, r, i, K, D)"""
    if blocks.shape[-1] == change.shape[4]:  # all of them, in order
        return change
    images, _, _, queries, _, dim = change.shape
    return change.gather(
        4, blocks[None, :, :, None, :, None].expand(images, -1, -1, queries, -1, dim)
    )


@dataclass
class CandidateErrors(Sums):
    """Of one layer, summed over images and queries.

    error  (H, K) squared change of the output by each candidate's head, after the output projection
    kept   (H, K, BINS) how many queries keep which share of their attention, in bins of equal width from 0 to 1
    """

    error: Tensor
    kept: Tensor

    @classmethod
    def empty(cls, heads: int, candidates: int) -> CandidateErrors:
        return cls(_zeros(heads, candidates), _zeros(heads, candidates, BINS))

    def add(self, seen: Observation, layout: TokenLayout, masks: Tensor) -> None:
        """One dense call of this layer; masks (H, K, R, C) bool, True = compute, of every head's candidates."""
        for rows in _block_rows(seen, layout):
            here = masks[:, :, rows.which]  # (H, K, r, C)
            # By what is kept, not by what is dropped: 1 - lost has no digits left where little is kept. Both sums are the same but for the sign.
            kept = torch.einsum("bhric,hkrc->bhkri", rows.mass, here.to(rows.mass))
            change = torch.einsum("bhricd,hkrc->bhkrid", rows.change, here.to(rows.change))
            off = (change / kept.clamp(min=1e-30)[..., None]).square().sum(-1)
            off = (
                off * ~here.all(-1)[..., None]
            )  # nothing dropped is no change, not a rounding error
            self.error += off.sum((0, 3, 4)).double().cpu()
            self.kept += _histogram(kept).double().cpu()


def _histogram(kept: Tensor) -> Tensor:
    """(B, H, K, r, i) shares -> (H, K, BINS) counts."""
    bins = (kept * BINS).long().clamp(0, BINS - 1).permute(1, 2, 0, 3, 4).flatten(2)
    return torch.zeros(*bins.shape[:2], BINS, device=kept.device).scatter_add_(
        -1, bins, torch.ones_like(bins, dtype=torch.float32)
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some blocks of queries, of i tokens each.

    which   the r blocks
    mass    (B, H, r, i, C) probability of each block of keys
    change  (B, H, r, i, C, D) u of each block of keys, after the output projection
    probs   (B, H, r * i, N)
    """

    which: slice
    mass: Tensor
    change: Tensor
    probs: Tensor


def _block_rows(seen: Observation, layout: TokenLayout) -> Iterator[_Rows]:
    """All blocks of queries, as many at once as `WORKING_MEMORY` allows; a last one that is shorter comes alone."""
    heads = seen.q.shape[1]
    q, k, v = (order_tokens(x.float(), layout) for x in (seen.q, seen.k, seen.v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    size, blocks = layout.block_size, layout.num_blocks
    padding = blocks * size - layout.num_tokens
    weighed = torch.einsum("bhnd,hde->bhne", v, _metric(seen))
    by_block = F.pad(weighed, (0, 0, 0, padding)).unflatten(2, (blocks, size))  # (B, H, C, j, D)
    bias = (
        None
        if seen.rel_pos is None
        else [order_tokens(term.float(), layout) for term in seen.rel_pos]
    )
    places = key_places(layout, True, q.device)
    full = layout.num_tokens // size
    step = max(1, WORKING_MEMORY // (4 * size * weighed[:, :, 0].numel() * blocks))
    starts = [*range(0, full, step), *([full] if full < blocks else [])]
    for first, last in zip(starts, [*starts[1:], blocks], strict=True):
        inside = slice(first * size, last * size)
        logits = q[:, :, inside] @ k.transpose(-1, -2) * seen.scale  # (B, H, r * i, N)
        if bias is not None:
            logits += sum(
                term[:, :, inside].index_select(-1, place)
                for term, place in zip(bias, places, strict=True)
            )
        probs = logits.softmax(-1)
        by_key = F.pad(probs, (0, padding)).unflatten(-1, (blocks, size))  # (B, H, r * i, C, j)
        mass = by_key.sum(-1)
        change = torch.einsum("bhicj,bhcjd->bhicd", by_key, by_block)
        change -= mass[..., None] * change.sum(
            3, keepdim=True
        )  # all blocks together are the output
        rows = last - first
        yield _Rows(
            slice(first, last),
            mass.unflatten(2, (rows, -1)),
            change.unflatten(2, (rows, -1)),
            probs,
        )


def _energy(out: Tensor, weight: Tensor | None) -> Tensor:
    """Squared length of outputs (B, H, tokens, D) after the output projection, () float32."""
    joined = out.transpose(1, 2).flatten(2)
    return (joined if weight is None else joined @ weight.float().T).square().sum()


def _metric(seen: Observation) -> Tensor:
    """(H, D, D): a square root of W_h^T W_h, so that lengths are those after the output projection; the identity where that is not known."""
    heads, dim = seen.q.shape[1], seen.v.shape[-1]
    if seen.weight is None:
        return torch.eye(dim, device=seen.v.device).expand(heads, -1, -1)
    by_head = seen.weight.float().unflatten(1, (heads, -1)).permute(1, 0, 2)  # (H, C, D)
    values, vectors = torch.linalg.eigh((by_head.transpose(1, 2) @ by_head).double())
    return (vectors * values.clamp(min=0).sqrt()[:, None]).float()

"""Statistics of dense runs that tell what sparsity would cost in each head.

They are sums over images, computed image by image, so processes can add theirs up. There are two
passes over the calibration images. The first sums where attention goes and how dropping a block
would change the output (`BlockStatistics`); the best blocks are chosen from it. The second
computes exactly how every candidate changes the output of its head (`CandidateErrors`). With p the
dense probabilities and u_iJ = sum over j in block J of p_ij (v_j - o_i), dropping the blocks D
changes the output of query i by

    o'_i - o_i = -(1 / m_i) sum over J in D of u_iJ = (1 / m_i) sum over J not in D of u_iJ

with m_i the probability that is kept. All vectors are measured after the output projection: v is
multiplied by a square root of W_h^T W_h. No N x N matrix is stored; a few block rows of all heads
are in memory at a time.
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
WORKING_MEMORY = 2 * 2**20  # bytes; at least one block of queries is processed at a time

T = TypeVar("T", bound="Sums")


class Sums:
    """Float64 tensors on the CPU that add up over images and processes."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def __add__(self: T, other: T) -> T:
        others = other.tensors()
        return type(self)(
            **{name: tensor + others[name] for name, tensor in self.tensors().items()}
        )


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


@dataclass
class BlockStatistics(Sums):
    """Statistics of the blocks of one layer, summed over images.

    mass   (H, R, C) attention that the queries of block R pay to the keys of block C, mean over
           the queries
    drop   (H, R, C) squared change of the output if only that block is dropped, before
           renormalisation, summed over the queries
    gram   (H, R, K, K) products of the changes by two blocks, summed over the queries. The squared
           change by several blocks is the sum over all pairs of them. Only K blocks of each row
           are compared, so the size grows with the number of rows, not with its cube
    total  () squared norm of the layer's dense output
    """

    mass: Tensor
    drop: Tensor
    gram: Tensor
    total: Tensor

    @classmethod
    def empty(cls, heads: int, layout: TokenLayout, compared: int = 0) -> BlockStatistics:
        """Return statistics of no image; `compared` is K."""
        shape = (heads, layout.num_blocks, layout.num_blocks)
        return cls(_zeros(*shape), _zeros(*shape), _zeros(*shape[:2], compared, compared), _zeros())

    def add(
        self,
        call: Observation,
        layout: TokenLayout,
        compared: Tensor | None = None,
        total: bool = True,
    ) -> None:
        """Add one dense call of this layer.

        compared  (H, R, K) blocks of each row that `gram` is about; None skips `gram`
        total     False skips `total`
        """
        group = call.q.shape[1] // call.v.shape[1]
        v = order_tokens(call.v.float(), layout).repeat_interleave(group, dim=1)
        for rows in _block_rows(call, layout):
            self.mass[:, rows.which] += rows.mass.mean(3).sum(0).double().cpu()
            self.drop[:, rows.which] += rows.change.square().sum((3, 5)).sum(0).double().cpu()
            if total:
                self.total += _squared_norm(rows.probs @ v, call.weight).double().cpu()
            if compared is not None:
                some = _of_blocks(rows.change, compared[:, rows.which].to(rows.change.device))
                products = torch.einsum("bhrikd,bhrijd->hrkj", some, some)
                self.gram[:, rows.which] += products.double().cpu()


def _of_blocks(change: Tensor, blocks: Tensor) -> Tensor:
    """Select blocks (H, r, K) of change (B, H, r, i, C, D) -> (B, H, r, i, K, D)."""
    if blocks.shape[-1] == change.shape[4]:  # all of them, in order
        return change
    images, _, _, queries, _, dim = change.shape
    return change.gather(
        4, blocks[None, :, :, None, :, None].expand(images, -1, -1, queries, -1, dim)
    )


@dataclass
class CandidateErrors(Sums):
    """Errors of the candidates of one layer, summed over images and queries.

    error  (H, K) squared change of the output by each candidate of a head, after the output
           projection
    kept   (H, K, BINS) histogram over queries of the share of attention that is kept, bins of
           equal width from 0 to 1
    """

    error: Tensor
    kept: Tensor

    @classmethod
    def empty(cls, heads: int, candidates: int) -> CandidateErrors:
        """Return errors of no image; `candidates` is K."""
        return cls(_zeros(heads, candidates), _zeros(heads, candidates, BINS))

    def add(self, call: Observation, layout: TokenLayout, masks: Tensor) -> None:
        """Add one dense call of this layer; masks (H, K, R, C) bool, True = compute."""
        for rows in _block_rows(call, layout):
            selected = masks[:, :, rows.which]  # (H, K, r, C)
            # Summed over the blocks kept, not over those dropped, which gives the same up to the
            # sign: if little is kept, 1 - lost has no significant digits left.
            kept = torch.einsum("bhric,hkrc->bhkri", rows.mass, selected.to(rows.mass))
            change = torch.einsum("bhricd,hkrc->bhkrid", rows.change, selected.to(rows.change))
            off = (change / kept.clamp(min=1e-30)[..., None]).square().sum(-1)
            off = off * ~selected.all(-1)[..., None]  # exactly 0, without rounding errors
            self.error += off.sum((0, 3, 4)).double().cpu()
            self.kept += _histogram(kept).double().cpu()


def _histogram(kept: Tensor) -> Tensor:
    """Count shares (B, H, K, r, i) -> (H, K, BINS)."""
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


def _block_rows(call: Observation, layout: TokenLayout) -> Iterator[_Rows]:
    """Yield all blocks of queries, as many at once as fit into `WORKING_MEMORY`.

    A last block that is shorter than the others comes alone.
    """
    heads = call.q.shape[1]
    q, k, v = (order_tokens(x.float(), layout) for x in (call.q, call.k, call.v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    size, blocks = layout.block_size, layout.num_blocks
    padding = blocks * size - layout.num_tokens
    weighted = torch.einsum("bhnd,hde->bhne", v, _metric(call))
    by_block = F.pad(weighted, (0, 0, 0, padding)).unflatten(2, (blocks, size))  # (B, H, C, j, D)
    bias = [order_tokens(term.float(), layout) for term in call.rel_pos or ()]
    places = key_places(layout, True, q.device)
    full = layout.num_tokens // size
    step = max(1, WORKING_MEMORY // (4 * size * weighted[:, :, 0].numel() * blocks))
    starts = [*range(0, full, step), *([full] if full < blocks else [])]
    for first, last in zip(starts, [*starts[1:], blocks], strict=True):
        inside = slice(first * size, last * size)
        logits = q[:, :, inside] @ k.transpose(-1, -2) * call.scale  # (B, H, r * i, N)
        if bias:
            logits += sum(
                term[:, :, inside].index_select(-1, place)
                for term, place in zip(bias, places, strict=True)
            )
        probs = logits.softmax(-1)
        by_key = F.pad(probs, (0, padding)).unflatten(-1, (blocks, size))  # (B, H, r * i, C, j)
        mass = by_key.sum(-1)
        change = torch.einsum("bhicj,bhcjd->bhicd", by_key, by_block)
        change -= mass[..., None] * change.sum(3, keepdim=True)  # the sum over blocks is the output
        shape = (last - first, -1)
        yield _Rows(slice(first, last), mass.unflatten(2, shape), change.unflatten(2, shape), probs)


def _squared_norm(out: Tensor, weight: Tensor | None) -> Tensor:
    """Return the squared norm () of outputs (B, H, tokens, D) after the output projection."""
    joined = out.transpose(1, 2).flatten(2)
    return (joined if weight is None else joined @ weight.float().T).square().sum()


def _metric(call: Observation) -> Tensor:
    """Return (H, D, D), a square root of W_h^T W_h; the identity if the weight is unknown.

    Norms of vectors multiplied by it are those after the output projection.
    """
    heads, dim = call.q.shape[1], call.v.shape[-1]
    if call.weight is None:
        return torch.eye(dim, device=call.v.device).expand(heads, -1, -1)
    by_head = call.weight.float().unflatten(1, (heads, -1)).permute(1, 0, 2)  # (H, C, D)
    values, vectors = torch.linalg.eigh((by_head.transpose(1, 2) @ by_head).double())
    return (vectors * values.clamp(min=0).sqrt()[:, None]).float()

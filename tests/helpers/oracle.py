"""An independent implementation of attention, query by query, to test `reference` against.

It follows the documentation of the kernel and shares no code with bsa_vision.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def number_slices(head_mask_type: list[int]) -> list[int]:
    """Number the slices as the kernel does: ones in head order, unless any entry is >= 2."""
    if max(head_mask_type) >= 2:
        return head_mask_type
    count = 0
    numbered = []
    for kind in head_mask_type:
        count += kind == 1
        numbered.append(count if kind == 1 else kind)
    return numbered


def attends(
    kind: int,
    sink_local: tuple[int, int],
    blocks: Tensor | None,
    i: int,
    j: int,
    n_q: int,
    n_k: int,
    causal: bool,
    exact: bool,
    size: int,
) -> bool:
    """Return whether query i attends to key j in a head of type `kind`.

    blocks  (R, C) the slice of the head
    """
    if causal and j > i + n_k - n_q:
        return False
    if kind == 0:
        return True
    if kind > 0:
        assert blocks is not None
        return bool(blocks[i // size, j // size])
    sink, local = sink_local
    if exact:
        return j < sink or i + n_k - n_q - local < j
    row, column = i // size, j // size
    if not causal:
        return column < sink or column >= math.ceil(n_k / size) - local
    start_row = max((n_q - n_k) // size, 0)
    if row < start_row:
        return False
    reach = math.ceil(max(n_k - n_q, 0) / size) + 1 + row - start_row
    return column < sink or reach - local <= column < reach


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: list[int],
    bounds_k: list[int],
    head_mask_type: list[int],
    streaming_info: list[int] | None,
    base_blockmask: Tensor | None,
    causal: bool = False,
    exact: bool = False,
    scale: float | None = None,
    size: int = 128,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention in float64: (out (T, H, Dv), lse (images, H, max_seqlen)).

    q, k, v  (T, H, D), the images one after the other
    bounds_* first token of each image, then the number of tokens
    """
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    images = len(bounds_q) - 1
    max_seqlen = max_seqlen or max(b - a for a, b in pairwise(bounds_q))
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=torch.float64)
    lse = torch.full((images, q.shape[1], max_seqlen), math.inf, dtype=torch.float64)
    for image in range(images):
        n_q, n_k = bounds_q[image + 1] - bounds_q[image], bounds_k[image + 1] - bounds_k[image]
        for head, kind in enumerate(number_slices(head_mask_type)):
            pair = streaming_info[2 * head : 2 * head + 2] if streaming_info else (0, 0)
            blocks = None
            if kind > 0:
                blocks = base_blockmask[min(image, len(base_blockmask) - 1), kind - 1]
            keys = k[bounds_k[image] : bounds_k[image + 1], head // group]
            values = v[bounds_k[image] : bounds_k[image + 1], head // group]
            for i in range(n_q):
                rule = (n_q, n_k, causal, exact, size)
                kept = [j for j in range(n_k) if attends(kind, pair, blocks, i, j, *rule)]
                if not kept:
                    continue
                logits = scale * keys[kept] @ q[bounds_q[image] + i, head]
                out[bounds_q[image] + i, head] = logits.softmax(0) @ values[kept]
                lse[image, head, i] = logits.logsumexp(0)
    return out, lse

"""torch's FlexAttention on GPUs, with a `BlockMask` built directly from the block lists.

Source: arXiv 2412.05496; torch.nn.attention.flex_attention. Kept blocks are listed as "full", so
the compiled kernel evaluates no mask in them. Only blocks that are cut by causality or by the end
of a sequence are masked key by key. Nothing is N x N.

Relative position is a `score_mod`. If gradients are needed and the width permits it, it becomes
extra columns (`rel_pos_columns`), whose gradient is a matrix product; the gradient of the tables of
a `score_mod` would be one atomic addition per logit.

Constraints: CUDA with Triton; compiled at the first call of each shape; block sizes that are
multiples of 128; head dims of at least 16; no dropout, no exact streaming, no float64. On a CPU the
uncompiled functions build every logit; only tests use this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bsa_vision.attention.backends import rel_pos_columns
from bsa_vision.attention.backends.problem import Problem, Result
from bsa_vision.attention.block_lists import block_lists
from bsa_vision.attention.rel_pos import RelPos

BLOCK = 128  # size of the kernel's tiles, which must divide the block size
LEAST_DIM = 16
SHARED_MEMORY = 160_000  # bytes; data centre GPUs have more
SHAPES = 256  # limit of compiled shapes; torch's default of 8 is too low for several resolutions
MOST_BLOCKS = 2**24  # entries of the block mask of a ragged batch

Modify = Callable[..., Tensor]


def why_not(problem: Problem) -> str | None:
    """Return why FlexAttention cannot run `problem`; None if it can."""
    q, v, size = problem.q, problem.v, problem.masks.block_size
    if problem.not_on_nvidia:
        return f"FlexAttention skips blocks on CUDA only, {problem.not_on_nvidia}"
    if problem.dropout_p or problem.return_probs:
        return "FlexAttention has no dropout"
    if problem.exact_streaming:
        return "exact streaming is decided per token, 'flex' skips whole blocks"
    if size % BLOCK:
        return f"FlexAttention needs block sizes that are multiples of 128, the masks have {size}"
    if min(q.shape[-1], v.shape[-1]) < LEAST_DIM:
        return f"FlexAttention needs head dims of 16 or more, got {q.shape[-1]} and {v.shape[-1]}"
    if q.dtype == torch.float64:
        return "FlexAttention takes float16, bfloat16 or float32, got torch.float64"
    if 0 in (*q.shape, *problem.k.shape):
        return "there are no tokens"
    if problem.ragged and _blocks(problem) > MOST_BLOCKS:
        entries = f"{_blocks(problem):.1e} entries, limit {MOST_BLOCKS:.1e}"
        return f"a ragged batch is one sequence, whose block mask would be too large ({entries})"
    return _probe()


def _blocks(problem: Problem) -> int:
    """Return an upper bound on the entries of a ragged batch's block mask."""
    size, images = problem.masks.block_size, problem.num_images
    rows, columns = (x.shape[2] // size + images for x in (problem.q, problem.k))
    return rows * columns * problem.num_heads


@lru_cache(maxsize=1)
def _probe() -> str | None:
    from torch.utils._triton import has_triton

    return None if has_triton() else "FlexAttention is compiled with Triton, which is not installed"


def run(problem: Problem) -> Result:
    """Compute `problem`."""
    if problem.rel_pos is None or not problem.needs_gradient:
        return _run(problem)
    if rel_pos_columns.why_not(problem, _widest(problem)) is not None:
        return _run(problem)
    if problem.order_q is not None:
        terms = RelPos(*(term.index_select(2, problem.order_q) for term in problem.rel_pos))
        problem = replace(problem, rel_pos=terms, order_q=None)
    return rel_pos_columns.attend(problem, _widest(problem), _run)


def _widest(problem: Problem) -> int:
    """Return the largest width of queries and keys whose tiles fit into shared memory."""
    return 256 if problem.q.dtype.itemsize == 2 else 128


def _run(problem: Problem) -> Result:
    where = _where(problem)
    q = _spread(problem.q, where.place_q, where.tokens[0])
    k, v = (_spread(x, where.place_k, where.tokens[1]) for x in (problem.k, problem.v))
    out, lse = _compiled(problem.q.device.type)(
        q,
        k,
        v,
        score_mod=_score_mod(problem),
        block_mask=where.blocks,
        scale=problem.scale,
        enable_gqa=problem.group > 1,
        kernel_options=_tiles(problem),
    )
    out = out if where.place_q is None else out.index_select(2, where.place_q)
    return Result(out, _lse(problem, where, lse) if problem.return_lse else None)


def _tiles(problem: Problem) -> dict[str, int] | None:
    """Return tile sizes of the forward kernel; None for torch's default.

    The cases were found by compiling for these GPUs: there the default does not fit into shared
    memory, or spills kilobytes of registers.
    """
    q, half = problem.q, problem.q.dtype.itemsize == 2
    if q.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(q.device)
    small = getattr(properties, "shared_memory_per_block_optin", 0) < SHARED_MEMORY
    if small and max(q.shape[-1], problem.v.shape[-1]) > 64:
        return _tile(64, 64 if half else 32, warps=4, stages=2)
    if half and problem.rel_pos is not None and torch.cuda.get_device_capability(q.device)[0] == 9:
        return _tile(128, 64, warps=8, stages=3)
    return None


def _tile(queries: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "fwd_BLOCK_M": queries,
        "fwd_BLOCK_N": keys,
        "fwd_num_warps": warps,
        "fwd_num_stages": stages,
    }


@lru_cache(maxsize=2)
def _compiled(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `flex_attention` with its log-sum-exp, compiled on CUDA, else with backend "eager"."""
    from torch.nn.attention import flex_attention as flex

    lse = flex.AuxRequest(lse=True)
    # fullgraph: a silent fallback to the uncompiled form would build N x N logits.
    # With dynamic shapes the kernel would check the end of the sequence in every block.
    call: Any = torch.compile(
        flex.flex_attention,
        fullgraph=True,
        dynamic=False,
        backend="inductor" if device == "cuda" else "eager",
    )

    def attend(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        with torch._dynamo.config.patch(cache_size_limit=SHAPES):
            out, found = call(*tensors, **options, return_aux=lse)
        return out, found.lse

    return attend


# Conversion of masks


@dataclass(frozen=True, eq=False)
class _Where:
    """The block mask, and the positions of the tokens.

    A ragged batch becomes one sequence in which each image starts a new block.

    tokens            number of queries and keys, with this padding
    place_q, place_k  (Tq,), (Tk,) padded position of each token of a ragged batch; None = unchanged
    lengths           queries of each image of a ragged batch
    """

    blocks: Any
    tokens: tuple[int, int]
    place_q: Tensor | None
    place_k: Tensor | None
    lengths: tuple[int, ...]


def _where(problem: Problem) -> _Where:
    lengths = tuple(
        (span.q.stop - span.q.start, span.k.stop - span.k.start) for span in problem.spans()
    )
    lengths = lengths if problem.ragged else lengths[:1]
    key = ("flex", problem.ragged, lengths, problem.is_causal, problem.q.device)
    return problem.masks.remember(key, lambda: _make(problem, lengths))


def _make(problem: Problem, lengths: tuple[tuple[int, int], ...]) -> _Where:
    from torch.nn.attention.flex_attention import BlockMask

    size, causal, device = problem.masks.block_size, problem.is_causal, problem.q.device
    queries, keys = ([length[side] for length in lengths] for side in (0, 1))
    block_mask = _block_mask(problem, lengths)
    rows, columns = block_mask.shape[2:]
    tokens = (size * rows, size * columns) if problem.ragged else lengths[0]
    at_q, at_k = (_positions(x, size, problem.ragged) for x in (queries, keys))
    # A query attends to the keys whose `number` is at most its `reach`: positions (bottom-right
    # aligned) if causal, otherwise all keys. Padding as a query reaches all keys of the images;
    # padding as a key is reached by no query.
    far = 2 * max(*tokens, 1)
    offset = [k - q if causal else far // 2 for q, k in lengths]
    offsets = torch.tensor(offset, device="cpu").repeat_interleave(
        torch.tensor(queries, device="cpu")
    )
    reach = _fill(tokens[0], at_q.place, at_q.position + offsets, far)
    number = _fill(tokens[1], at_k.place, at_k.position, far + 1)
    seen, whole = _seen((rows, columns), reach, number, size)
    mask_mod = _mask_mod(block_mask.to(device), reach.to(device), number.to(device), size)
    # Row and column lists are both built here: `from_kv_blocks` builds the latter with vmap, which
    # does not work inside an operator.
    some, full = ((block_mask & part).to(device) for part in (seen & ~whole, whole))
    by_row = (*block_lists(some), *block_lists(full))
    by_column = (*block_lists(some.mT.contiguous()), *block_lists(full.mT.contiguous()))
    blocks = BlockMask(tokens, *by_row, *by_column, (size, size), mask_mod)
    place_q, place_k = (at.place.to(device) if problem.ragged else None for at in (at_q, at_k))
    return _Where(blocks, tokens, place_q, place_k, tuple(queries))


def _block_mask(problem: Problem, lengths: tuple[tuple[int, int], ...]) -> Tensor:
    """(1 or B, H, R, C) bool: the images of a ragged batch along the diagonal."""
    kept = [problem.masks.block_mask(*length, causal=problem.is_causal) for length in lengths]
    if not problem.ragged:
        return kept[0]
    images = [mask[problem.mask_image(i)] for i, mask in enumerate(kept)]
    heads = [torch.block_diag(*blocks) for blocks in zip(*images, strict=True)]
    return torch.stack(heads)[None].bool()


@dataclass(frozen=True, eq=False)
class _At:
    """Where each token is."""

    place: Tensor  # (T,) in the padded sequence
    position: Tensor  # (T,) in its image


def _positions(lengths: list[int], size: int, ragged: bool) -> _At:
    position = [torch.arange(length, device="cpu") for length in lengths]
    place, start = [], 0
    for length, within in zip(lengths, position, strict=True):
        place.append(within + start)
        start += -(-length // size) * size if ragged else length
    return _At(torch.cat(place), torch.cat(position))


def _fill(tokens: int, place: Tensor, values: Tensor, rest: int) -> Tensor:
    return torch.full((tokens,), rest, device="cpu").index_copy(0, place, values)


def _seen(
    blocks: tuple[int, int], reach: Tensor, number: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """(R, C) bool each: blocks in which some pair attends, and blocks in which every pair does."""

    def ends(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
        last = values[-1:].expand(count * size - len(values))  # fill up the last block
        return torch.cat([values, last]).view(count, size).aminmax(dim=1)

    (least_reach, most_reach), (least, most) = ends(reach, blocks[0]), ends(number, blocks[1])
    return least <= most_reach[:, None], most <= least_reach[:, None]


def _mask_mod(table: Tensor, reach: Tensor, number: Tensor, size: int) -> Modify:
    """Return the mask as a function.

    It includes the block mask, because the uncompiled form ignores the block lists.
    """
    images = table.shape[0]

    def mask_mod(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        kept = table[image % images, head, query // size, key // size]
        return kept & (number[key] <= reach[query])

    return mask_mod


def _score_mod(problem: Problem) -> Modify | None:
    """Return a function that adds relative position; with `order_q` it is in model order."""
    if problem.rel_pos is None:
        return None
    (rel_h, rel_w), order = problem.rel_pos, problem.order_q
    row, column = problem.key_row, problem.key_column
    assert row is not None
    assert column is not None

    def add(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rel_h[image, head, query, row[key]] + rel_w[image, head, query, column[key]]

    def add_ordered(
        score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor
    ) -> Tensor:
        place = order[query]  # type: ignore[index]
        return score + rel_h[image, head, place, row[key]] + rel_w[image, head, place, column[key]]

    return add if order is None else add_ordered


# Padding of ragged batches


def _spread(x: Tensor, place: Tensor | None, tokens: int) -> Tensor:
    """Pad (1, H, T, D) with zeros between the images, so that each starts a block."""
    if place is None:
        return x
    return x.new_zeros(*x.shape[:2], tokens, x.shape[3]).index_copy(2, place, x)


def _lse(problem: Problem, where: _Where, found: Tensor) -> Tensor:
    """Return the log-sum-exp per image, +inf for queries without keys."""
    found = found.masked_fill(found.isneginf(), torch.inf)
    if where.place_q is None:
        return found
    lse = problem.empty_lse().to(found.dtype)
    parts = found[0].index_select(1, where.place_q).split(where.lengths, dim=1)
    for image, part in enumerate(parts):
        lse[image, :, : part.shape[1]] = part
    return lse

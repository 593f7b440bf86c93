"""torch's FlexAttention, given our block lists as they are: relative position, any head dim, gradients, on GPUs.

Source: arXiv 2412.05496; torch.nn.attention.flex_attention. Kept blocks are listed as "full", for which the compiled kernel asks no
questions; only those that causality or the end of a sequence cuts are looked at key by key. Nothing is N x N.
Relative position is a `score_mod`; where gradients are asked for and it fits, it is more columns (`concat`), whose gradient is a product: that of a
`score_mod`'s tables is one atomic addition per logit.
Constraints: CUDA with Triton, compiled at the first call of each shape; blocks of a multiple of 128 tokens; no dropout.
On a CPU the same functions run un-compiled and build every logit: tests do that, users have `gather`.
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

BLOCK = 128  # the kernel's tiles are that large, and must divide the blocks
LEAST_DIM = 16
SHARED_MEMORY = 160_000  # bytes; the GPUs of data centres have more
SHAPES = (
    256  # compiled at most; torch's own limit of 8 is soon reached by models of several resolutions
)
MOST_BLOCKS = 2**24  # entries of the block mask of a ragged batch

Modify = Callable[..., Tensor]


def why_not(problem: Problem) -> str | None:
    q, v = problem.q, problem.v
    if problem.not_on_nvidia:
        return f"FlexAttention skips blocks on CUDA only, {problem.not_on_nvidia}"
    if problem.dropout_p or problem.return_probs:
        return "FlexAttention has no dropout"
    if problem.exact_streaming:
        return "exact streaming is decided per token, 'flex' skips whole blocks"
    if problem.masks.block_size % BLOCK:
        return f"FlexAttention's tiles of 128 tokens must divide the blocks, the masks have blocks of {problem.masks.block_size}"
    if min(q.shape[-1], v.shape[-1]) < LEAST_DIM:
        return f"FlexAttention needs head dims of 16 or more, got {q.shape[-1]} and {v.shape[-1]}"
    if q.dtype == torch.float64:
        return "FlexAttention takes float16, bfloat16 or float32, got torch.float64"
    if 0 in (*q.shape, *problem.k.shape):
        return "there are no tokens"
    if problem.ragged and _blocks(problem) > MOST_BLOCKS:
        return f"images of different sizes follow each other as one sequence, whose block mask would be too large ({_blocks(problem):.1e} entries)"
    return _probe()


def _blocks(problem: Problem) -> int:
    """Entries of the block mask of all images of a ragged batch, at most."""
    size, images = problem.masks.block_size, problem.num_images
    rows, columns = (x.shape[2] // size + images for x in (problem.q, problem.k))
    return rows * columns * problem.num_heads


@lru_cache(maxsize=1)
def _probe() -> str | None:
    from torch.utils._triton import has_triton

    return None if has_triton() else "FlexAttention is compiled with Triton, which is not installed"


def run(problem: Problem) -> Result:
    if (
        problem.rel_pos is None
        or not problem.needs_gradient
        or rel_pos_columns.why_not(problem, _widest(problem)) is not None
    ):
        return _run(problem)
    if problem.order_q is not None:
        terms = RelPos(*(term.index_select(2, problem.order_q) for term in problem.rel_pos))
        problem = replace(problem, rel_pos=terms, order_q=None)
    return rel_pos_columns.attend(problem, _widest(problem), _run)


def _widest(problem: Problem) -> int:
    """Columns of queries and keys for which the kernel's tiles fit into shared memory."""
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
    """Of the forward kernel, where torch's own choice does not fit, or spills registers by the kilobyte: seen by compiling for these GPUs."""
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
    """`flex_attention` with its log-sum-exp, compiled; by the backend "eager", which builds everything, where there is no Triton."""
    from torch.nn.attention import flex_attention as flex

    lse = flex.AuxRequest(lse=True)
    # fullgraph: falling back to the un-compiled form must be an error, not N x N without a word.
    # Shapes stay fixed: with dynamic ones the kernel would check the end of the sequence in every block.
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


# Masks in FlexAttention's terms


@dataclass(frozen=True, eq=False)
class _Where:
    """The block mask, and where tokens stand.

    tokens            queries and keys as FlexAttention sees them
    place_q, place_k  (Tq,), (Tk,) of a ragged batch: its images follow each other as one sequence in which each begins a block of its own;
                      None = as they come
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

    masks, size, causal, device = (
        problem.masks,
        problem.masks.block_size,
        problem.is_causal,
        problem.q.device,
    )
    kept = [masks.block_mask(*length, causal=causal) for length in lengths]
    if problem.ragged:  # (1, H, R, C): what images keep of themselves, along the diagonal
        images = [mask[problem.mask_image(i)] for i, mask in enumerate(kept)]
        kept = [
            torch.stack([torch.block_diag(*own) for own in zip(*images, strict=True)])[None].bool()
        ]
    block_mask = kept[0]
    rows, columns = block_mask.shape[2:]
    tokens = (size * rows, size * columns) if problem.ragged else lengths[0]
    at_q, at_k = (
        _positions([own[side] for own in lengths], size, problem.ragged) for side in (0, 1)
    )
    # A query sees the keys whose number it reaches: positions, counted from the end, where attention is causal; every key elsewhere. What is
    # only there to fill a block reaches everything as a query and is reached by none as a key.
    far = 2 * max(*tokens, 1)
    late = [k - q if causal else far // 2 for q, k in lengths]
    added = torch.tensor(late, device="cpu").repeat_interleave(
        torch.tensor([q for q, _ in lengths], device="cpu")
    )
    reach = _fill(tokens[0], at_q.place, at_q.position + added, far)
    number = _fill(tokens[1], at_k.place, at_k.position, far + 1)
    seen, whole = _seen((rows, columns), reach, number, size)
    sees = _mask_mod(block_mask.to(device), reach.to(device), number.to(device), size)
    # Both lists of rows and of columns: `from_kv_blocks` makes the second by vmap, which is not there inside of an operator.
    some, full = (part.to(device) for part in (block_mask & seen & ~whole, block_mask & whole))
    rows_of, columns_of = (
        [block_lists(part) for part in (x, y)]
        for x, y in ((some, full), (some.mT.contiguous(), full.mT.contiguous()))
    )
    blocks = BlockMask(
        tokens, *rows_of[0], *rows_of[1], *columns_of[0], *columns_of[1], (size, size), sees
    )
    place_q, place_k = (at.place.to(device) if problem.ragged else None for at in (at_q, at_k))
    return _Where(blocks, tokens, place_q, place_k, tuple(q for q, _ in lengths))


@dataclass(frozen=True, eq=False)
class _At:
    """(T,) each: the place of every token, and its position in its own image."""

    place: Tensor
    position: Tensor


def _positions(lengths: list[int], size: int, ragged: bool) -> _At:
    position = [torch.arange(length, device="cpu") for length in lengths]
    place, start = [], 0
    for length, own in zip(lengths, position, strict=True):
        place.append(own + start)
        start += -(-length // size) * size if ragged else length
    return _At(torch.cat(place), torch.cat(position))


def _fill(tokens: int, place: Tensor, values: Tensor, rest: int) -> Tensor:
    return torch.full((tokens,), rest, device="cpu").index_copy(0, place, values)


def _seen(
    blocks: tuple[int, int], reach: Tensor, number: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """(R, C) bool: blocks of which something is seen, and those of which everything is."""

    def ends(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
        last = values[-1:].expand(count * size - len(values))  # a last block that is shorter
        return torch.cat([values, last]).view(count, size).aminmax(dim=1)

    (least_reach, most_reach), (least, most) = ends(reach, blocks[0]), ends(number, blocks[1])
    return least <= most_reach[:, None], most <= least_reach[:, None]


def _mask_mod(table: Tensor, reach: Tensor, number: Tensor, size: int) -> Modify:
    """Whether a query sees a key; also the whole truth where FlexAttention is not compiled and looks at no list."""
    images = table.shape[0]

    def sees(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[image % images, head, query // size, key // size] & (
            number[key] <= reach[query]
        )

    return sees


def _score_mod(problem: Problem) -> Modify | None:
    """Relative position, read in model order: `order_q` finds it there."""
    if problem.rel_pos is None:
        return None
    (rel_h, rel_w), row, column, order = (
        problem.rel_pos,
        problem.key_row,
        problem.key_column,
        problem.order_q,
    )
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


# Tokens to their places and back


def _spread(x: Tensor, place: Tensor | None, tokens: int) -> Tensor:
    """(1, H, T, D) -> the same with zeros between images, so that each begins a block."""
    return (
        x
        if place is None
        else x.new_zeros(*x.shape[:2], tokens, x.shape[3]).index_copy(2, place, x)
    )


def _lse(problem: Problem, where: _Where, found: Tensor) -> Tensor:
    found = found.masked_fill(
        found.isneginf(), torch.inf
    )  # as the kernel says that a query sees nothing
    if where.place_q is None:
        return found
    lse = problem.empty_lse().to(found.dtype)
    own = found[0].index_select(1, where.place_q).split(where.lengths, dim=1)
    for image, part in enumerate(own):
        lse[image, :, : part.shape[1]] = part
    return lse

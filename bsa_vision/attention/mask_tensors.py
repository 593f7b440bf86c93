"""Check and read the kernel's tensors: base_blockmask, head_mask_type and streaming_info."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DENSE, STREAMING = 0, -1


def other_block_size(
    num_blocks: tuple[int, int], block_size: int, tokens: tuple[int, int]
) -> int | None:
    """Return the usual block size, other than `block_size`, with `num_blocks` blocks of `tokens`.

    1 means a mask of tokens; None if no size matches.
    """
    for size in (1, 16, 32, 64, 128, 256):
        if size != block_size and num_blocks == tuple(-(-count // size) for count in tokens):
            return size
    return None


def what_fits(
    num_blocks: tuple[int, int], block_size: int, tokens: tuple[int, int], where: str
) -> str:
    """Return the advice for an error message about masks of the wrong size.

    where  the class to pass a block size to
    """
    size = other_block_size(num_blocks, block_size, tokens)
    if size == 1:
        return (
            "this is a mask of tokens, but one entry per pair of blocks is needed; make it from a "
            "pattern"
        )
    advice = f"make the mask for this many tokens (with special tokens) in blocks of {block_size}"
    if size is None:
        return advice
    return f"if its blocks have {size} tokens, pass block_size={size} to {where}; else {advice}"


def resolve_slices(
    head_mask_type: Tensor | Sequence[int] | None, mask: Tensor | None
) -> tuple[int, ...]:
    """Return for each head 0 (dense), -1 (streaming), or the 1-based number of its slice.

    `HeadMasks` documents the two conventions of `head_mask_type`.
    """
    num_slices = 0 if mask is None else mask.shape[1]
    if head_mask_type is None:
        if num_slices == 0:
            raise ValueError(
                "base_blockmask and head_mask_type are both None: pass one of them, it sets the "
                "number of heads."
            )
        return tuple(range(1, num_slices + 1))
    types = as_ints("head_mask_type", head_mask_type)
    if min(types, default=0) < STREAMING or not types:
        raise ValueError(
            f"head_mask_type={types}: expected entries -1 (streaming), 0 (dense) or slice numbers "
            "from 1."
        )
    positive = [t for t in types if t > 0]
    if max(types) <= 1:
        if len(positive) != num_slices:
            raise ValueError(
                f"head_mask_type has {len(positive)} ones, base_blockmask {num_slices} slices: "
                "expected one slice per block-sparse head; add slices, or number them explicitly "
                "(1, 2, 2, ...) to share one."
            )
        numbers = iter(range(1, num_slices + 1))
        return tuple(next(numbers) if t == 1 else t for t in types)
    if max(types) > num_slices:
        raise ValueError(
            f"head_mask_type refers to slice {max(types)}, base_blockmask has {num_slices}: slices "
            "count from 1; add slices or lower the entry."
        )
    if positive.count(1) > 1 and len(positive) == num_slices > max(types):
        raise ValueError(
            f"head_mask_type={types} mixes ones with larger entries, base_blockmask has "
            f"{num_slices} slices: an entry >= 2 makes all entries slice numbers, which leaves "
            f"slices unused; write 1 to {num_slices}, or only ones."
        )
    return tuple(types)


def resolve_streaming(
    info: Tensor | Sequence[int] | None, slices: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return (sink, local) for each head, or () without `info`; raise if `slices` do not match."""
    if info is None:
        if STREAMING in slices:
            raise ValueError(
                f"head {slices.index(STREAMING)} is a streaming head (-1) but streaming_info is "
                f"None: pass [sink, local] for every head, {2 * len(slices)} ints."
            )
        return ()
    values = as_ints("streaming_info", info)
    if len(values) != 2 * len(slices) or min(values, default=0) < 0:
        raise ValueError(
            f"streaming_info={values}: expected {2 * len(slices)} ints >= 0, [sink, local] for "
            f"each of {len(slices)} heads; use [0, 0] for heads that are not streaming."
        )
    return tuple(zip(values[::2], values[1::2], strict=True))


def as_ints(name: str, values: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Return a one-dimensional integer tensor or sequence as a tuple of ints."""
    try:
        tensor = torch.as_tensor(values, device=None if isinstance(values, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}={values!r}: expected integers; use torch.tensor([...], dtype=torch.int32)."
        ) from None
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: expected a one-dimensional "
            "int32 tensor; use torch.tensor([...], dtype=torch.int32)."
        )
    return tuple(int(value) for value in tensor.tolist())

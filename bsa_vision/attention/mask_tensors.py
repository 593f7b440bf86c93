"""Check and read the kernel's tensors: base_blockmask, head_mask_type and streaming_info."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DENSE, STREAMING = 0, -1


def other_block_size(
    num_blocks: tuple[int, int], block_size: int, tokens: tuple[int, int]
) -> int | None:
    """The block size that explains masks of `num_blocks` for so many tokens, among the usual ones; 1 = a mask of tokens."""
    sizes = (size for size in (1, 16, 32, 64, 128, 256) if size != block_size)
    return next(
        (size for size in sizes if num_blocks == tuple(-(-count // size) for count in tokens)), None
    )


def what_fits(
    num_blocks: tuple[int, int], block_size: int, tokens: tuple[int, int], where: str
) -> str:
    """The end of a message about masks of the wrong size: what to do. `where` takes the block size."""
    size = other_block_size(num_blocks, block_size, tokens)
    if size == 1:
        return "this is a mask of tokens, and one entry per pair of blocks is needed; make it from a pattern"
    wanted = (
        f"make the mask for this many tokens (special tokens included) in blocks of {block_size}"
    )
    return (
        wanted
        if size is None
        else f"if its blocks are of {size} tokens, pass block_size={size} to {where}; else {wanted}"
    )


def resolve_slices(
    head_mask_type: Tensor | Sequence[int] | None, mask: Tensor | None
) -> tuple[int, ...]:
    """Per head: 0 dense, -1 streaming, otherwise its 1-based slice. `HeadMasks` states the two conventions."""
    num_slices = 0 if mask is None else mask.shape[1]
    if head_mask_type is None:
        if num_slices == 0:
            raise ValueError(
                "neither base_blockmask nor head_mask_type says how many heads there are: pass one of them."
            )
        return tuple(range(1, num_slices + 1))
    types = as_ints("head_mask_type", head_mask_type)
    if min(types, default=0) < STREAMING or not types:
        raise ValueError(
            f"head_mask_type={types}: entries must be -1 (streaming), 0 (dense) or a slice from 1; correct it."
        )
    positive = [t for t in types if t > 0]
    if max(types) <= 1:
        if len(positive) != num_slices:
            raise ValueError(
                f"head_mask_type has {len(positive)} ones, base_blockmask {num_slices} slices: each block-sparse head needs "
                "its own slice; add slices, or number them explicitly (1, 2, 2, ...) to share one."
            )
        numbers = iter(range(1, num_slices + 1))
        return tuple(next(numbers) if t == 1 else t for t in types)
    if max(types) > num_slices:
        raise ValueError(
            f"head_mask_type asks for slice {max(types)}, base_blockmask has {num_slices}: explicit slices count from 1; add "
            "slices or lower the entry."
        )
    if positive.count(1) > 1 and len(positive) == num_slices > max(types):
        raise ValueError(
            f"head_mask_type={types} mixes counted ones with explicit slices, base_blockmask has {num_slices}: with any entry "
            f">= 2 all entries are explicit, which would leave slices unused; write 1 to {num_slices} out, or only ones."
        )
    return tuple(types)


def resolve_streaming(
    info: Tensor | Sequence[int] | None, slices: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if info is None:
        if STREAMING in slices:
            raise ValueError(
                f"head {slices.index(STREAMING)} is a streaming head (-1) but streaming_info is None: pass [sink, local] for "
                f"every head, {2 * len(slices)} ints."
            )
        return ()
    values = as_ints("streaming_info", info)
    if len(values) != 2 * len(slices) or min(values, default=0) < 0:
        raise ValueError(
            f"streaming_info={values}: expected {2 * len(slices)} ints >= 0, [sink, local] for each of {len(slices)} heads; "
            "give heads that do not stream [0, 0]."
        )
    return tuple(zip(values[::2], values[1::2], strict=True))


def as_ints(name: str, values: Tensor | Sequence[int]) -> tuple[int, ...]:
    """A one-dimensional integer tensor or sequence as a tuple of ints."""
    try:
        tensor = torch.as_tensor(values, device=None if isinstance(values, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}={values!r}: expected whole numbers; use torch.tensor([...], dtype=torch.int32)."
        ) from None
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: expected a one-dimensional int32 tensor; use "
            f"torch.tensor([...], dtype=torch.int32)."
        )
    return tuple(int(value) for value in tensor.tolist())

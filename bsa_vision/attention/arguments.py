"""Check the arguments of attention calls: shapes, dtypes, devices and sequence lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from bsa_vision.attention.backends.problem import check_bounds
from bsa_vision.attention.head_masks import HeadMasks, check_blockmask, instead_of_masks
from bsa_vision.attention.mask_tensors import what_fits
from bsa_vision.attention.rel_pos import RelPos

BLOCK = 128  # tokens per block in the kernel, and so in masks given as bare tensors
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, dims: int, expected: str, num_heads: int | None = None
) -> None:
    """Raise unless q, k and v are floating point tensors whose shapes, dtypes and devices match.

    dims       number of axes
    expected   the shape as the caller knows it, e.g. "(B, H, N, D)"
    num_heads  heads of the masks; with them, swapped head and token axes are recognised
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} is a {type(x).__name__}: expected a floating point tensor {expected}; "
                "convert it with torch.as_tensor."
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {x.dtype}: expected a floating point tensor {expected}; convert it "
                "with .float()."
            )
        if x.is_nested:
            raise TypeError(
                f"{name} is a nested tensor: expected {expected}; pass images of different sizes "
                f"as lists ({name}.unbind()) with one HeadMasks each, or as one sequence packed "
                "with bsa.pack."
            )
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == dims:
        packing = dims == 3 and q.dim() == 4 and expected.startswith("(total")
        how = "; flatten (B, N, H, D) with x.flatten(0, 1)" if packing else ""
        raise ValueError(f"{shapes}: expected {expected} for each{how}.")
    heads, tokens = (1, 2) if dims == 4 else (1, 0) if expected.startswith("(total") else (0, 1)
    if num_heads is not None and q.shape[heads] != num_heads == q.shape[tokens]:
        swap = f"transpose({min(heads, tokens)}, {max(heads, tokens)})"
        raise ValueError(
            f"{shapes}: expected {expected}, but the token axis has size {num_heads}, the number "
            f"of heads in the masks; swap the head and token axes with x.{swap}."
        )
    _check_sizes(q, k, v, heads, tokens, shapes)
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise TypeError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}: "
            "expected one dtype and one device; convert them with .to(q)."
        )


def _check_sizes(q: Tensor, k: Tensor, v: Tensor, heads: int, tokens: int, shapes: str) -> None:
    """Raise unless the axes of q, k and v have matching sizes."""
    if (
        q.shape[-1] != k.shape[-1]
        or k.shape[heads] != v.shape[heads]
        or k.shape[tokens] != v.shape[tokens]
    ):
        raise ValueError(
            f"{shapes}: q and k must have the same head dim, k and v the same heads and tokens."
        )
    if q.shape[-1] == 0:
        raise ValueError(f"{shapes}: the head dim is 0; expected at least 1.")
    if k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]:
        raise ValueError(
            f"{shapes}: {q.shape[heads]} query heads are not a multiple of {k.shape[heads]} key "
            "heads; repeat or drop key heads."
        )
    if q.dim() == 4 and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"{shapes}: the batch sizes differ; expand the smaller ones.")


def check_fit(q: Tensor, k: Tensor, masks: HeadMasks, rel_pos: RelPos | None) -> None:
    """Raise ValueError unless `masks` fit (B, H, N, D) queries and keys of these shapes."""
    if q.shape[1] != masks.num_heads:
        raise ValueError(
            f"q has {q.shape[1]} heads, the HeadMasks {masks.num_heads}: they must be equal; "
            "rebuild the masks."
        )
    if masks.base_blockmask is not None and masks.base_blockmask.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"q has {q.shape[0]} images, base_blockmask {masks.base_blockmask.shape[0]}: expected "
            "1 or the same number; index the mask."
        )
    lengths, size, blocks = (q.shape[2], k.shape[2]), masks.block_size, masks.num_blocks
    for axis, (name, tokens) in enumerate(zip("qk", lengths, strict=True)):
        layout = masks.kv_layout if axis else masks.layout
        if layout is not None and tokens != masks.num_tokens[axis]:
            raise ValueError(
                f"{name} has {tokens} tokens, the layout of the HeadMasks {layout.num_tokens} "
                f"({layout.num_prefix_tokens} prefix + {layout.grid[0]} x {layout.grid[1]} "
                f"patches + {layout.num_suffix_tokens} suffix): make the masks for this grid."
            )
        if blocks is not None and blocks[axis] != -(-tokens // size):
            assert masks.base_blockmask is not None
            raise ValueError(
                f"{name} has {tokens} tokens in {-(-tokens // size)} blocks of {size}, "
                f"base_blockmask has shape {tuple(masks.base_blockmask.shape)}: its "
                f"{'columns' if axis else 'rows'} must match; "
                f"{what_fits(blocks, size, lengths, 'HeadMasks')}."
            )
    if rel_pos is not None:
        _check_rel_pos(q, masks, rel_pos)


def _check_rel_pos(q: Tensor, masks: HeadMasks, rel_pos: RelPos) -> None:
    layout = masks.kv_layout
    if layout is None or layout.num_prefix_tokens or layout.num_suffix_tokens:
        raise ValueError(
            f"rel_pos needs HeadMasks with a layout without special tokens, got layout={layout}: "
            "the layout gives the patch of each key; pass layout=TokenLayout(grid) to HeadMasks."
        )
    if any(term.dtype != q.dtype for term in rel_pos):
        raise TypeError(
            f"rel_pos is {[term.dtype for term in rel_pos]}, q {q.dtype}: expected one dtype; "
            "convert with .to(q)."
        )
    expected = [(*q.shape[:3], side) for side in layout.grid]
    got = [tuple(term.shape) for term in rel_pos]
    if got != expected:
        raise ValueError(
            f"rel_pos has shapes {got}: expected {expected} for the grid {layout.grid}; see "
            "rel_pos.decompose."
        )


def check_numbers(dropout: float, scale: float | None) -> None:
    """Raise unless `dropout` is a probability below 1 and `scale` a number or None."""
    if (
        isinstance(dropout, bool)
        or not isinstance(dropout, (int, float))
        or not 0.0 <= dropout < 1.0
    ):
        raise ValueError(f"dropout {dropout!r}: expected a probability, 0 <= p < 1.")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(
            f"scale is {scale!r}: expected a number that multiplies q . k, or None for D ** -0.5."
        )


def check_head_masks(head_masks: object, q: object) -> None:
    """Raise TypeError unless `head_masks` is a `HeadMasks` or a list of them, for `q`."""
    if isinstance(head_masks, HeadMasks):
        return
    several = list(head_masks) if isinstance(head_masks, (list, tuple)) else [head_masks]
    if all(isinstance(masks, HeadMasks) for masks in several):
        return
    wrong = next(masks for masks in several if not isinstance(masks, HeadMasks))
    how = instead_of_masks(head_masks if isinstance(wrong, Tensor) else wrong)
    if (
        isinstance(wrong, Tensor)
        and isinstance(q, Tensor)
        and wrong.dim() >= 2
        and wrong.shape[-2] == q.shape[-2]
    ):
        how = (
            "this is a mask of tokens, for torch's scaled_dot_product_attention; make a mask of "
            "blocks from a pattern with bsa.HeadMasks.from_patterns"
        )
    raise TypeError(
        f"head_masks is a {type(head_masks).__name__}: expected HeadMasks, or a list of them for "
        f"a list of images; {how}."
    )


def check_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],
    max_seqlens: tuple[int, int],
    is_causal: bool,
    exact_streaming: bool,
) -> None:
    """Raise unless the arguments of a packed call fit each other.

    masks  (head_mask_type, streaming_info, base_blockmask)
    """
    for name, bounds, tokens, most in zip("qk", cu_seqlens, (q, k), max_seqlens, strict=True):
        if isinstance(most, bool) or not isinstance(most, (int, torch.SymInt)):
            raise TypeError(
                f"max_seqlen_{name}_ is {most!r}: expected an int, the tokens of the longest "
                "sequence."
            )
        if not isinstance(bounds, Tensor):
            raise TypeError(
                f"cu_seqlens_{name} is a {type(bounds).__name__}: expected a (batch + 1,) int32 "
                "tensor; use torch.tensor."
            )
        if bounds.dim() != 1 or bounds.dtype != torch.int32 or bounds.shape[0] < 2:
            raise TypeError(
                f"cu_seqlens_{name} is {bounds.dtype} of shape {tuple(bounds.shape)}: expected "
                "(batch + 1,) torch.int32; convert it with .to(torch.int32)."
            )
        # On other devices, reading the values would synchronise.
        if bounds.device.type == "cpu" and not torch.compiler.is_compiling():
            check_bounds(name, bounds, tokens.shape[0], most)
    batch, batch_k = cu_seqlens[0].shape[0] - 1, cu_seqlens[1].shape[0] - 1
    if batch != batch_k:
        raise ValueError(
            f"cu_seqlens_q is for {batch} sequences, cu_seqlens_k for {batch_k}: they must "
            "describe the same batch."
        )
    head_mask_type, _, base_blockmask = masks
    if base_blockmask is not None:
        check_blockmask(base_blockmask)
    if not isinstance(head_mask_type, Tensor):
        raise TypeError(
            f"head_mask_type is a {type(head_mask_type).__name__}: expected an (H,) int32 tensor; "
            "use torch.tensor."
        )
    if head_mask_type.shape != (q.shape[1],):
        raise ValueError(
            f"head_mask_type has shape {tuple(head_mask_type.shape)}, q has {q.shape[1]} heads: "
            "expected one int32 entry per head."
        )
    if base_blockmask is not None:
        _check_packed_blocks(base_blockmask, batch, max_seqlens)
    if exact_streaming and not is_causal:
        raise ValueError(
            "exact_streaming=True with is_causal=False: exact streaming is causal only; pass "
            "is_causal=True."
        )


def _check_packed_blocks(mask: Tensor, batch: int, max_seqlens: tuple[int, int]) -> None:
    blocks, shape = [-(-n // BLOCK) for n in max_seqlens], tuple(mask.shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or list(shape[2:]) != blocks:
        raise ValueError(
            f"base_blockmask has shape {shape}: expected ({batch}, S, {blocks[0]}, {blocks[1]}), "
            f"blocks of {BLOCK} of the longest sequences ({max_seqlens[0]} and {max_seqlens[1]} "
            "tokens). Only sparse_attention takes other block sizes."
        )

"""What users may pass to attention: shapes, dtypes, lengths; each error says what was given, what is allowed, what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from bsa_vision.attention.backends.problem import check_bounds
from bsa_vision.attention.head_masks import HeadMasks, check_blockmask, instead_of_masks
from bsa_vision.attention.mask_tensors import what_fits
from bsa_vision.attention.rel_pos import RelPos

BLOCK = 128  # of the kernel, and so of masks that come as bare tensors
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, dims: int, expected: str, num_heads: int | None = None
) -> None:
    """Raise unless q, k and v are floating tensors of `dims` axes that fit each other; `expected` is how users know them.

    num_heads  of the masks: where the axis of tokens has that size, and that of heads another, the two are swapped
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            given = isinstance(x, Tensor)
            got = str(x.dtype) if given else f"a {type(x).__name__}"
            how = "with .float()" if given else "with torch.as_tensor"
            raise TypeError(
                f"{name} is {got}: expected a floating point tensor {expected}; convert it, e.g. {how}."
            )
        if x.is_nested:
            raise TypeError(
                f"{name} is a nested tensor: expected {expected}; give images of different sizes as lists, "
                f"{name}.unbind(), with one HeadMasks each, or as one sequence by bsa.pack."
            )
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == dims:
        packing = dims == 3 and q.dim() == 4 and expected.startswith("(total")
        how = ", (B, N, H, D) with x.flatten(0, 1)" if packing else ""
        raise ValueError(f"{shapes}: expected {expected} for each; reshape them{how}.")
    heads, tokens = (1, 2) if dims == 4 else (1, 0) if expected.startswith("(total") else (0, 1)
    if num_heads is not None and q.shape[heads] != num_heads == q.shape[tokens]:
        swap = f"transpose({min(heads, tokens)}, {max(heads, tokens)})"
        raise ValueError(
            f"{shapes}: expected {expected}, and these have the {num_heads} heads of the masks where tokens belong; swap the "
            f"two axes of each, x.{swap}."
        )
    if (
        q.shape[-1] != k.shape[-1]
        or k.shape[heads] != v.shape[heads]
        or k.shape[tokens] != v.shape[tokens]
    ):
        raise ValueError(
            f"{shapes}: q and k need one head dim, k and v the same heads and tokens; correct the one that differs."
        )
    if q.shape[-1] == 0:
        raise ValueError(f"{shapes}: the head dim is 0; pass tensors with at least one feature.")
    if k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]:
        raise ValueError(
            f"{shapes}: {q.shape[heads]} query heads are not a multiple of {k.shape[heads]} key heads; repeat or drop key heads."
        )
    if dims == 4 and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"{shapes}: the batch sizes differ; expand the smaller ones.")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise TypeError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}: one dtype and one device are "
            "needed; convert them with .to(q)."
        )


def check_fit(q: Tensor, k: Tensor, masks: HeadMasks, rel_pos: RelPos | None) -> None:
    """Whether `masks` were made for (B, H, N, D) queries and keys like these."""
    if q.shape[1] != masks.num_heads:
        raise ValueError(
            f"q has {q.shape[1]} heads, the HeadMasks {masks.num_heads}: they must be equal; rebuild the masks."
        )
    if masks.base_blockmask is not None and masks.base_blockmask.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"q has {q.shape[0]} images, base_blockmask {masks.base_blockmask.shape[0]}: allowed are 1 or as many; index the mask."
        )
    lengths, size, blocks = (q.shape[2], k.shape[2]), masks.block_size, masks.num_blocks
    for axis, (name, tokens) in enumerate(zip("qk", lengths, strict=True)):
        layout = masks.kv_layout if axis else masks.layout
        if layout is not None and tokens != masks.num_tokens[axis]:
            raise ValueError(
                f"{name} has {tokens} tokens, the layout of the HeadMasks {layout.num_tokens} "
                f"({layout.num_prefix_tokens} special + {layout.grid[0]} x {layout.grid[1]} patches + "
                f"{layout.num_suffix_tokens} special): make the masks for this grid."
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
            f"rel_pos needs HeadMasks with a layout without special tokens, got layout={layout}: it says which patch each key "
            "is; pass layout=TokenLayout(grid) when making the HeadMasks."
        )
    expected = [(*q.shape[:3], side) for side in layout.grid]
    got = [tuple(term.shape) for term in rel_pos]
    if any(term.dtype != q.dtype for term in rel_pos):
        raise TypeError(
            f"rel_pos is {[term.dtype for term in rel_pos]}, q {q.dtype}: one dtype is needed; convert with .to(q)."
        )
    if got != expected:
        raise ValueError(
            f"rel_pos has shapes {got}: expected {expected} for the grid {layout.grid}; see rel_pos.decompose."
        )


def check_numbers(dropout: float, scale: float | None) -> None:
    if (
        isinstance(dropout, bool)
        or not isinstance(dropout, (int, float))
        or not 0.0 <= dropout < 1.0
    ):
        raise ValueError(
            f"dropout {dropout!r}: expected a probability from 0 up to, but not including, 1; pass 0.0 for none."
        )
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(
            f"scale is {scale!r}: expected a number that multiplies q . k; pass one, or None for D ** -0.5."
        )


def check_head_masks(head_masks: object, q: object) -> None:
    """Raise unless `head_masks` is one `HeadMasks`, or a list of them; `q` is what they are for."""
    if isinstance(head_masks, HeadMasks):
        return
    several = list(head_masks) if isinstance(head_masks, (list, tuple)) else [head_masks]
    wrong = next((masks for masks in several if not isinstance(masks, HeadMasks)), None)
    if wrong is None and all(isinstance(masks, HeadMasks) for masks in several):
        return
    how = instead_of_masks(head_masks if isinstance(wrong, Tensor) else wrong)
    if (
        isinstance(wrong, Tensor)
        and isinstance(q, Tensor)
        and wrong.dim() >= 2
        and wrong.shape[-2] == q.shape[-2]
    ):
        how = (
            "this is a mask of tokens, for torch's scaled_dot_product_attention; a mask of blocks is made from a pattern "
            "with bsa.HeadMasks.from_patterns"
        )
    raise TypeError(
        f"head_masks is a {type(head_masks).__name__}: expected HeadMasks, or a list of them for a list of images; {how}."
    )


def check_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],
    longest: tuple[int, int],
    is_causal: bool,
    exact_streaming: bool,
) -> None:
    for name, bounds, tokens, most in zip(("q", "k"), cu_seqlens, (q, k), longest, strict=True):
        if isinstance(most, bool) or not isinstance(most, (int, torch.SymInt)):
            raise TypeError(
                f"max_seqlen_{name}_ is {most!r}: expected the tokens of the longest sequence; pass an int."
            )
        if not isinstance(bounds, Tensor):
            raise TypeError(
                f"cu_seqlens_{name} is a {type(bounds).__name__}: expected a (batch + 1,) int32 tensor; use torch.tensor."
            )
        if bounds.dim() != 1 or bounds.dtype != torch.int32 or bounds.shape[0] < 2:
            raise TypeError(
                f"cu_seqlens_{name} is {bounds.dtype} of shape {tuple(bounds.shape)}: expected (batch + 1,) torch.int32; convert "
                "it with .to(torch.int32)."
            )
        if (
            bounds.device.type == "cpu" and not torch.compiler.is_compiling()
        ):  # elsewhere reading values would stall the device
            check_bounds(name, bounds, tokens.shape[0], most)
    if cu_seqlens[0].shape != cu_seqlens[1].shape:
        raise ValueError(
            f"cu_seqlens_q is for {cu_seqlens[0].shape[0] - 1} sequences, cu_seqlens_k for {cu_seqlens[1].shape[0] - 1}: they "
            "must describe the same batch."
        )
    head_mask_type, _, base_blockmask = masks
    if base_blockmask is not None:
        check_blockmask(base_blockmask)
    if not isinstance(head_mask_type, Tensor):
        raise TypeError(
            f"head_mask_type is a {type(head_mask_type).__name__}: expected an (H,) int32 tensor; use torch.tensor."
        )
    if head_mask_type.shape != (q.shape[1],):
        raise ValueError(
            f"head_mask_type has shape {tuple(head_mask_type.shape)}, q has {q.shape[1]} heads: expected one int32 entry per "
            "head; correct one of them."
        )
    if base_blockmask is not None:
        batch, blocks = cu_seqlens[0].shape[0] - 1, [-(-n // BLOCK) for n in longest]
        shape = tuple(base_blockmask.shape)
        if len(shape) != 4 or shape[0] not in (1, batch) or list(shape[2:]) != blocks:
            raise ValueError(
                f"base_blockmask has shape {shape}: expected ({batch}, S, {blocks[0]}, {blocks[1]}), blocks of {BLOCK} of the "
                f"longest sequences ({longest[0]} and {longest[1]} tokens); make it for these lengths. (Blocks of other sizes "
                "are for sparse_attention.)"
            )
    if exact_streaming and not is_causal:
        raise ValueError(
            "exact_streaming=True with is_causal=False: exact streaming is causal only; pass is_causal=True."
        )

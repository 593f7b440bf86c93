"""Block masks of all heads of one layer: the kernel's three tensors and their token layouts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from bsa_vision.attention.block_lists import BlockRow, KeyRanges, block_rows, key_ranges
from bsa_vision.attention.head_patterns import HeadPattern, Images, blocks_of, per_head
from bsa_vision.attention.mask_source import MaskSource
from bsa_vision.attention.mask_tensors import (
    DENSE,
    STREAMING,
    as_ints,
    resolve_slices,
    resolve_streaming,
    what_fits,
)
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.masks.origin import check_layout, layouts_of
from bsa_vision.storage.memory_cache import Cache

T = TypeVar("T")


class HeadMasks(MaskSource):
    """Masks of all heads of one attention layer.

    base_blockmask   (B or 1, S, R, C) bool, True = compute, one slice per block-sparse head; None
                     without such heads
    head_mask_type   (H,) ints: 0 dense, > 0 block-sparse, -1 streaming; None = all ones, so H = S.
                     If no entry is >= 2, the ones use slices 1, 2, 3 ... in head order, and S must
                     equal their count. If any entry is >= 2, positive entries are 1-based slice
                     numbers, and S must be at least the largest.
    streaming_info   (2 * H,) ints, [sink, local] blocks per head; required for streaming heads,
                     whose queries attend to the first `sink` and the last `local` blocks
    layout           layout of the rows; None = tokens in the order given
    kv_layout        layout of the columns, if keys are not the queries' tokens; None = `layout`
    block_size       tokens per block; with a layout, its block size
    allow_empty_rows allow query blocks without key blocks (their output is 0)

    num_heads        H
    all_dense        whether every head computes every block
    num_blocks       (R, C), or None without block-sparse heads
    num_tokens       tokens of the two layouts, each None without a layout

    The masks are copied. Raises ValueError or TypeError for wrong shapes, dtypes, slice numbers and
    empty rows, and for ambiguous types: ones and larger entries, as many as there are slices, that
    leave slices unused. `from_patterns` makes masks and layout in one call.
    """

    def __init__(
        self,
        base_blockmask: Tensor | None,
        head_mask_type: Tensor | Sequence[int] | None = None,
        streaming_info: Tensor | Sequence[int] | None = None,
        *,
        layout: TokenLayout | None = None,
        kv_layout: TokenLayout | None = None,
        block_size: int = 128,
        allow_empty_rows: bool = False,
    ) -> None:
        # A copy, because cached results must not change with the caller's tensor.
        self.base_blockmask = (
            None if base_blockmask is None else check_blockmask(base_blockmask).detach().clone()
        )
        # The layouts that the masks were made for, if known; `check` compares them with `layout`.
        self.made_for = None if base_blockmask is None else layouts_of(base_blockmask)
        # Per head: 0 dense, -1 streaming, otherwise its 1-based slice of base_blockmask.
        self.slices = resolve_slices(head_mask_type, self.base_blockmask)
        self.num_heads = len(self.slices)
        self.all_dense = not any(self.slices)
        shape = () if base_blockmask is None else base_blockmask.shape
        self.num_blocks = (shape[2], shape[3]) if shape else None
        self._given_types = (
            (1,) * len(self.slices)
            if head_mask_type is None
            else as_ints("head_mask_type", head_mask_type)
        )
        # (sink, local) per head, or ()
        self.streaming = resolve_streaming(streaming_info, self.slices)
        for name, given in (("layout", layout), ("kv_layout", kv_layout)):
            if given is not None:
                check_layout(name, given)
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ValueError(
                f"block_size={block_size!r}: expected an integer >= 1, the tokens per block."
            )
        self.layout = layout
        self.kv_layout = layout if kv_layout is None else kv_layout
        self.block_size = block_size if layout is None else layout.block_size
        self.allow_empty_rows = allow_empty_rows
        self._check_layouts(block_size)
        layouts = (self.layout, self.kv_layout)
        self.num_tokens = tuple(None if x is None else x.num_tokens for x in layouts)
        # The layouts to sort tokens by; None if order does not change the result.
        self.orders = tuple(
            None if x is None or x.is_identity or self.all_dense else x for x in layouts
        )
        if not allow_empty_rows:
            self._check_rows()
        self._cache: Cache[Any] = Cache(32)
        self._latest: tuple[Hashable, KeyRanges] | None = None
        self._new_handle()

    @classmethod
    def from_patterns(
        cls,
        layout: TokenLayout,
        patterns: HeadPattern | Sequence[HeadPattern],
        *,
        heads: int | None = None,
        kv_layout: TokenLayout | None = None,
        boxes: Images | None = None,
        stream: int = 0,
        allow_empty_rows: bool = False,
    ) -> HeadMasks:
        """Build the masks from one pattern per head, for `layout`.

        patterns   one per head, or a single one for all `heads`: "dense", a name of
                   `masks.PATTERNS`, a `masks.Pattern`, a function layout -> (R, C) bool (called as
                   (layout, kv_layout) if there is a `kv_layout`), or a mask (R, C) or (B, R, C)
        kv_layout  layout of the keys, if they are not the queries' tokens
        boxes      for patterns that follow prompts: per image, a list of
                   (top, left, bottom, right) in patches
        stream     random stream of the first head; head h draws from stream + h

        Patterns and functions keep the rows and columns of special tokens; masks are used as they
        are. A head that keeps every block becomes dense. Raises ValueError or TypeError.

            >>> layout = masks.TokenLayout((64, 64), num_prefix_tokens=1, order="tile")
            >>> near = masks.Pattern("local_window", radius=8)
            >>> hm = HeadMasks.from_patterns(layout, ["dense"] * 2 + [near] * 10)
        """
        check_layout("layout", layout)
        if kv_layout is not None:
            check_layout("kv_layout", kv_layout)
        masks = [
            blocks_of(pattern, head, layout, kv_layout, boxes, stream + head)
            for head, pattern in enumerate(per_head(patterns, heads))
        ]  # (images, R, C) each
        sparse = [mask for mask in masks if mask is not None and not mask.all()]
        images = max(map(len, sparse), default=1)
        if any(len(mask) not in (1, images) for mask in sparse):
            raise ValueError(
                f"heads have masks for {sorted(set(map(len, sparse)))} images: expected 1, or the "
                "same number for all heads; index them."
            )
        expanded = [mask.expand(images, -1, -1) for mask in sparse]
        return cls(
            torch.stack(expanded, dim=1) if expanded else None,  # (images, S, R, C)
            [int(mask is not None and not mask.all()) for mask in masks],
            layout=layout,
            kv_layout=kv_layout,
            allow_empty_rows=allow_empty_rows,
        )

    # Properties and conversions

    @property
    def head_mask_type(self) -> Tensor:
        """(H,) int32 as given to the constructor, for the kernel's function."""
        return torch.tensor(self._given_types, dtype=torch.int32, device=self._device)

    @property
    def streaming_info(self) -> Tensor | None:
        """(2 * H,) int32 for the kernel's function, or None."""
        numbers = [number for pair in self.streaming for number in pair]
        return torch.tensor(numbers, dtype=torch.int32, device=self._device) if numbers else None

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.base_blockmask is None else self.base_blockmask.device

    @property
    def head_sparsity(self) -> tuple[float, ...]:
        """Realised sparsity of each head: the fraction of its blocks that is skipped, 0 to 1."""
        if self.num_blocks is None and -1 not in self.slices:
            return (0.0,) * self.num_heads
        rows, columns = self.num_blocks or self._layout_blocks()
        mask = self.block_mask(rows * self.block_size, columns * self.block_size)
        return tuple((1 - mask.float().mean((0, 2, 3))).tolist())

    @property
    def sparsity(self) -> float:
        """Mean realised sparsity of all heads, including dense ones."""
        return sum(self.head_sparsity) / self.num_heads

    def block_mask(self, num_q: int, num_k: int, *, causal: bool = False) -> Tensor:
        """Return the mask of every head for `num_q` queries and `num_k` keys, on the CPU.

        (B or 1, H, R, C) bool. Sequences shorter than the masks use their top-left part. `causal`
        only moves streaming windows from the end of the sequence to the diagonal; causality itself
        is finer than a block.
        """
        key = ("block_mask", num_q, num_k, causal)
        return self._cache.get(key, lambda: self._expand(num_q, num_k, causal))

    def block_rows(
        self, num_q: int, num_k: int, *, causal: bool = False
    ) -> list[list[list[BlockRow]]]:
        """Return the key runs of every query block, [mask image][head][query block]."""
        key = ("block_rows", num_q, num_k, causal)
        mask = self.block_mask(num_q, num_k, causal=causal)
        return self._cache.get(key, lambda: block_rows(mask, self.block_size, num_q, num_k))

    def key_ranges(self, num_q: int, num_k: int, *, causal: bool = False) -> KeyRanges:
        """Return the key ranges of every query block as tensors."""
        key = ("key_ranges", num_q, num_k, causal)
        if self._latest is not None and self._latest[0] == key:
            return self._latest[1]
        mask = self.block_mask(num_q, num_k, causal=causal)
        ranges = self._cache.get(key, lambda: key_ranges(mask, self.block_size, num_q, num_k))
        self._latest = (key, ranges)
        return ranges

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return `make()`, cached under `key`; backends cache their form of the masks."""
        return self._cache.get(key, make)

    def kept_pairs(self, num_q: int, num_k: int) -> tuple[int, ...]:
        """Return the query-key pairs that each head computes, as a mean over mask images.

        Shorter last blocks count with their actual size.
        """
        size, mask = self.block_size, self.block_mask(num_q, num_k)
        rows, columns = (
            (total - torch.arange(count, device="cpu") * size).clamp(max=size).double()
            for count, total in zip(mask.shape[2:], (num_q, num_k), strict=True)
        )
        pairs = torch.einsum("bhrc,r,c->h", mask.double(), rows, columns) / len(mask)
        return tuple(round(count) for count in pairs.tolist())

    def masks_for(self, grid: tuple[int, int], num_keys: int) -> HeadMasks:
        """Return self. `LayerMasks` implements the same method for any grid."""
        return self

    def __repr__(self) -> str:
        dense, streaming = self.slices.count(DENSE), self.slices.count(STREAMING)
        sparse = self.num_heads - dense - streaming
        mask = self.base_blockmask
        shape = "no block mask" if mask is None else f"base_blockmask {tuple(mask.shape)}"
        return (
            f"HeadMasks({self.num_heads} heads: {dense} dense, {sparse} block-sparse, {streaming} "
            f"streaming; {shape}, block_size={self.block_size}, layout={self.layout})"
        )

    # Expansion to one mask per head

    def _expand(self, num_q: int, num_k: int, causal: bool) -> Tensor:
        rows, columns = -(-num_q // self.block_size), -(-num_k // self.block_size)
        base = None if self.base_blockmask is None else self.base_blockmask.cpu()
        images = 1 if base is None else base.shape[0]
        mask = torch.ones(images, self.num_heads, rows, columns, dtype=torch.bool, device="cpu")
        for head, kind in enumerate(self.slices):
            if kind == STREAMING:
                mask[:, head] = self._streaming_blocks(head, num_q, num_k, causal)
            elif kind > 0:
                assert base is not None
                mask[:, head] = base[:, kind - 1, :rows, :columns]
        return mask

    def _streaming_blocks(self, head: int, num_q: int, num_k: int, causal: bool) -> Tensor:
        """Return the (R, C) mask of a streaming head: sinks, and a window that ends at `reach`.

        Source: `fwdStreaming` in block_sparse_attn v0.0.2.
        """
        sink, local = self.streaming[head]
        size = self.block_size
        rows = torch.arange(-(-num_q // size), device="cpu")[:, None]
        columns = torch.arange(-(-num_k // size), device="cpu")[None]
        if not causal:
            return ((columns < sink) | (columns >= columns.shape[1] - local)).expand(len(rows), -1)
        start_row = max((num_q - num_k) // size, 0)
        reach = -(-max(num_k - num_q, 0) // size) + 1 + rows - start_row
        return (
            ((columns < sink) | (columns >= reach - local))
            & (columns < reach)
            & (rows >= start_row)
        )

    # Checks

    def _layout_blocks(self) -> tuple[int, int]:
        if self.layout is None or self.kv_layout is None:
            raise ValueError(
                "these HeadMasks have neither a block mask nor a layout, so their size is unknown: "
                "pass layout=."
            )
        return self.layout.num_blocks, self.kv_layout.num_blocks

    def _check_layouts(self, block_size: int) -> None:
        if self.layout is None and self.kv_layout is not None:
            raise ValueError(
                "kv_layout is given without layout: pass layout= for the rows as well."
            )
        if block_size not in (128, self.block_size):
            raise ValueError(
                f"block_size={block_size} but layout.block_size={self.block_size}: they must be "
                "equal; omit block_size."
            )
        for name, layout, axis in (("layout", self.layout, 0), ("kv_layout", self.kv_layout, 1)):
            if layout is None:
                continue
            if layout.block_size != self.block_size:
                raise ValueError(
                    f"{name}.block_size={layout.block_size} differs from {self.block_size}: both "
                    "layouts must have the same block size."
                )
            if self.num_blocks is not None and self.num_blocks[axis] != layout.num_blocks:
                assert self.layout is not None
                assert self.kv_layout is not None
                tokens = (self.layout.num_tokens, self.kv_layout.num_tokens)
                how = what_fits(self.num_blocks, layout.block_size, tokens, "TokenLayout")
                raise ValueError(
                    f"base_blockmask has {self.num_blocks[axis]} block "
                    f"{'columns' if axis else 'rows'}, {name} has {layout.num_tokens} tokens in "
                    f"{layout.num_blocks} blocks of {layout.block_size}: they must match; {how}."
                )

    def _check_rows(self) -> None:
        used = sorted({s - 1 for s in self.slices if s > 0})
        if used:
            assert self.base_blockmask is not None
            empty = (~self.base_blockmask[:, used].any(-1)).nonzero()
            if len(empty):
                image, position, row = empty[0].tolist()
                raise ValueError(
                    f"query block {row} of image {image}, slice {used[position] + 1} keeps no key "
                    f"block ({len(empty)} such rows): every query needs at least one key; keep the "
                    "diagonal, or pass allow_empty_rows=True for an output of 0."
                )
        for head, kind in enumerate(self.slices):
            if kind == STREAMING and sum(self.streaming[head]) == 0:
                raise ValueError(
                    f"streaming head {head} has sink=0 and local=0, so it keeps no key block: "
                    "raise one of them in streaming_info, or pass allow_empty_rows=True for an "
                    "output of 0."
                )


def instead_of_masks(given: object) -> str:
    """Return the advice for an error message about an object that is not a mask."""
    first = given[0] if isinstance(given, (tuple, list)) and given else given
    if isinstance(first, Tensor) and first is not given:
        if first.dim() == 4:
            return "unpack the tuple that a generator returned, bsa.HeadMasks(*generated)"
        return "stack one (R, C) mask per head, bsa.HeadMasks(masks.stack_heads(list, 1))"
    if isinstance(given, Tensor):
        return "wrap a base_blockmask as bsa.HeadMasks(base_blockmask, head_mask_type)"
    if isinstance(given, HeadMasks):
        return "use the HeadMasks as it is"
    if isinstance(first, (Pattern, str)) or callable(first):
        return "build masks from patterns with bsa.HeadMasks.from_patterns(layout, patterns)"
    return (
        "convert an array with torch.as_tensor, or build masks from patterns with "
        "bsa.HeadMasks.from_patterns"
    )


def check_blockmask(mask: object) -> Tensor:
    """Return `mask`; raise TypeError or ValueError unless it is a (B or 1, S, R, C) bool tensor."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"base_blockmask is a {type(mask).__name__}: expected a bool tensor; "
            f"{instead_of_masks(mask)}."
        )
    if mask.dtype != torch.bool:
        raise TypeError(
            f"base_blockmask has dtype {mask.dtype}: expected torch.bool, True = compute; use "
            "mask.bool() for ones and zeros, mask == 0 for an additive mask."
        )
    if mask.dim() != 4:
        missing = ", ".join(["None"] * (4 - mask.dim()))
        how = f"; add the missing axes, mask[{missing}]" if 2 <= mask.dim() < 4 else ""
        raise ValueError(
            f"base_blockmask has shape {tuple(mask.shape)}: expected (B or 1, S, R, C), one slice "
            f"per block-sparse head and one entry per pair of blocks{how}."
        )
    return mask

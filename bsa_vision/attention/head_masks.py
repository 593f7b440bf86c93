"""Which key blocks each head's query blocks compute: the kernel's three tensors, the layouts they were made for, checked once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bsa_vision.attention.block_lists import BlockRow, KeyRanges, block_rows, key_ranges
from bsa_vision.attention.head_patterns import HeadPattern, Images, blocks_of, per_head
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.masks.origin import check_layout, layouts_of
from bsa_vision.storage.memory_cache import Cache

try:
    from torch.fx.experimental.sym_node import DynamicInt
except ImportError:  # older versions of torch compile each layer by itself
    DynamicInt = int  # type: ignore[assignment, misc]

T = TypeVar("T")


class Handled:
    """An object that a compiled graph can name by an int: `handle` finds it again for as long as it lives.

    torch custom operators take tensors and numbers only. Copies and unpickled objects get handles of their own.
    """

    handle: int
    dynamic_handle: int  # the same for torch.compile, which makes one graph for layers that differ in nothing else

    def _new_handle(self) -> None:
        self.handle = next(_next_handle)
        self.dynamic_handle = DynamicInt(self.handle)
        _by_handle[self.handle] = self

    def masks_for(self, grid: tuple[int, int], num_keys: int) -> HeadMasks:
        """Return the masks for images of `grid` patches and `num_keys` keys."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("handle", "dynamic_handle")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._new_handle()


_next_handle = count(1)
_by_handle: WeakValueDictionary[int, Handled] = WeakValueDictionary()


def from_handle(handle: int) -> Any:
    """The living object with this handle."""
    found = _by_handle.get(handle)
    if found is None:
        raise RuntimeError(
            f"the masks of a compiled graph (handle {handle}) are gone: they must outlive the graph; keep the HeadMasks or the "
            "swapped model referenced, or compile again."
        )
    return found


class HeadMasks(Handled):
    """The masks of all heads of one attention layer.

    base_blockmask   (B or 1, S, R, C) bool, True = compute, one slice per block-sparse head; None when there is none
    head_mask_type   (H,) ints: 0 dense, > 0 block-sparse, -1 streaming; None = all ones, so H = S.
                     No entry >= 2: the ones take slices 1, 2, 3 ... in head order, and S must equal their count.
                     Any entry >= 2: positive entries are explicit 1-based slices, and S must reach the largest.
    streaming_info   (2 * H,) ints, [sink, local] blocks per head; needed by streaming heads: every query sees the first
                     `sink` and the last `local` blocks of its sequence
    layout           the layout the rows were made for; None = tokens as they come
    kv_layout        the layout of the columns where keys are other tokens than queries; None = `layout`
    block_size       tokens per block; taken from `layout` when that is given
    allow_empty_rows a query block that sees nothing is an error unless this is set (its output
                     would be 0)

    num_heads        H
    all_dense        whether every head computes every block
    num_blocks       (R, C), or None without block-sparse heads
    num_tokens       of the two layouts, None without one

    The masks are copied. Ones mixed with larger entries are refused where they could be meant as counted (as many positive
    entries as slices, and slices left over). Raises ValueError or TypeError for shapes, dtypes, slice numbers and empty rows
    that do not fit. `from_patterns` makes masks and layout in one call.
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
        # What is remembered follows from the masks, so later writes to the caller's tensor must not count.
        self.base_blockmask = (
            None if base_blockmask is None else check_blockmask(base_blockmask).detach().clone()
        )
        # The layouts the masks were made for, where that is known; `check` compares them with those given.
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
        self.streaming = _resolve_streaming(
            streaming_info, self.slices
        )  # (sink, local) per head, or nothing
        for name, given in (("layout", layout), ("kv_layout", kv_layout)):
            if given is not None:
                check_layout(name, given)
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ValueError(
                f"block_size={block_size!r}: expected a whole number of tokens of at least 1; give such an int."
            )
        self.layout = layout
        self.kv_layout = layout if kv_layout is None else kv_layout
        self.block_size = block_size if layout is None else layout.block_size
        self.allow_empty_rows = allow_empty_rows
        self._check_layouts(block_size)
        layouts = (self.layout, self.kv_layout)
        self.num_tokens = tuple(None if x is None else x.num_tokens for x in layouts)
        # The layouts that tokens must be sorted by; none where order does not change the result.
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
        """Lay one pattern per head out on `layout`, so that masks and layout cannot disagree.

        patterns   one per head, or a single one for all `heads`: "dense", a name of `masks.PATTERNS`, a `masks.Pattern`,
                   a function layout -> (R, C) bool, called as (layout, kv_layout) where that is given, or such a mask,
                   also (B, R, C)
        kv_layout  the layout of the keys where they are other tokens than queries
        boxes      for patterns that follow prompts: per image, a list of (top, left, bottom, right) in patches
        stream     of the first head: random patterns of head h draw from stream + h

        Special rows and columns are kept by patterns and functions; masks are taken as they are. A head that keeps every
        block becomes dense. ValueError or TypeError for what does not fit.

            >>> layout = masks.TokenLayout((64, 64), start=1, order="tile")
            >>> hm = HeadMasks.from_patterns(layout, ["dense"] * 2 + [masks.Pattern("local_window", radius=8)] * 10)
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
                f"heads have masks for {sorted(set(map(len, sparse)))} images: expected 1 or one number for all; index them."
            )
        return cls(
            torch.stack([mask.expand(images, -1, -1) for mask in sparse], dim=1)
            if sparse
            else None,  # (images, S, R, C)
            [int(mask is not None and not mask.all()) for mask in masks],
            layout=layout,
            kv_layout=kv_layout,
            allow_empty_rows=allow_empty_rows,
        )

    # What the masks say

    @property
    def head_mask_type(self) -> Tensor:
        """(H,) int32 in the convention it was given in, as the kernel's function takes it."""
        return torch.tensor(self._given_types, dtype=torch.int32, device=self._device)

    @property
    def streaming_info(self) -> Tensor | None:
        """(2 * H,) int32 as the kernel's function takes it, or None."""
        numbers = [number for pair in self.streaming for number in pair]
        return torch.tensor(numbers, dtype=torch.int32, device=self._device) if numbers else None

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.base_blockmask is None else self.base_blockmask.device

    @property
    def head_sparsity(self) -> tuple[float, ...]:
        """Realised sparsity of each head: the fraction of its blocks that are skipped, 0 to 1."""
        if self.num_blocks is None and -1 not in self.slices:
            return (0.0,) * self.num_heads
        rows, columns = self.num_blocks or self._layout_blocks()
        kept = (
            self.block_mask(rows * self.block_size, columns * self.block_size)
            .float()
            .mean((0, 2, 3))
        )
        return tuple((1 - kept).tolist())

    @property
    def sparsity(self) -> float:
        """Realised sparsity over all heads, dense ones included."""
        return sum(self.head_sparsity) / self.num_heads

    def block_mask(self, num_q: int, num_k: int, *, causal: bool = False) -> Tensor:
        """(B or 1, H, R, C) bool on the CPU: every head of a sequence of `num_q` queries and `num_k` keys spelled out.

        Sequences shorter than the masks use their top-left part. `causal` only says where streaming windows lie
        (along the diagonal instead of at the end of the sequence); causality itself is finer than a block.
        """
        key = ("block_mask", num_q, num_k, causal)
        return self._cache.get(key, lambda: self._expand(num_q, num_k, causal))

    def block_rows(
        self, num_q: int, num_k: int, *, causal: bool = False
    ) -> list[list[list[BlockRow]]]:
        """What there is to compute, as key runs: [mask image][head][query block]."""
        key = ("block_rows", num_q, num_k, causal)
        mask = self.block_mask(num_q, num_k, causal=causal)
        return self._cache.get(key, lambda: block_rows(mask, self.block_size, num_q, num_k))

    def key_ranges(self, num_q: int, num_k: int, *, causal: bool = False) -> KeyRanges:
        """What there is to compute, as tensors."""
        key = ("key_ranges", num_q, num_k, causal)
        if self._latest is not None and self._latest[0] == key:
            return self._latest[1]
        mask = self.block_mask(num_q, num_k, causal=causal)
        table = self._cache.get(key, lambda: key_ranges(mask, self.block_size, num_q, num_k))
        self._latest = (key, table)
        return table

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes of these masks, made once: backends keep the masks in their own terms here."""
        return self._cache.get(key, make)

    def kept_pairs(self, num_q: int, num_k: int) -> tuple[int, ...]:
        """Query-key pairs each head computes, ragged last blocks counted as they are; the mean over mask images."""
        size, mask = self.block_size, self.block_mask(num_q, num_k)
        rows, columns = (
            torch.full((count,), size, device="cpu").clamp(
                max=total - torch.arange(count, device="cpu") * size
            )
            for count, total in zip(mask.shape[2:], (num_q, num_k), strict=True)
        )
        pairs = torch.einsum("bhrc,r,c->h", mask.double(), rows.double(), columns.double()) / len(
            mask
        )
        return tuple(round(count) for count in pairs.tolist())

    def masks_for(self, grid: tuple[int, int], num_keys: int) -> HeadMasks:
        """Return self. `LayerMasks` implements the same method for any grid."""
        return self

    def __repr__(self) -> str:
        dense, streaming = self.slices.count(DENSE), self.slices.count(STREAMING)
        shape = (
            "no block mask"
            if self.base_blockmask is None
            else f"base_blockmask {tuple(self.base_blockmask.shape)}"
        )
        kinds = f"{dense} dense, {self.num_heads - dense - streaming} block-sparse, {streaming} streaming"
        return f"HeadMasks({self.num_heads} heads: {kinds}; {shape}, block_size={self.block_size}, layout={self.layout})"

    # How they are spelled out

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
        """Sinks, and a window that ends at `reach`; as `fwdStreaming` in block_sparse_attn v0.0.2 does it."""
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
                "these HeadMasks have neither a block mask nor a layout, so their size is unknown: pass layout=."
            )
        return self.layout.num_blocks, self.kv_layout.num_blocks

    def _check_layouts(self, block_size: int) -> None:
        if self.layout is None and self.kv_layout is not None:
            raise ValueError(
                "kv_layout is given without layout: both are needed, rows and columns; pass layout as well."
            )
        if block_size not in (128, self.block_size):
            raise ValueError(
                f"block_size={block_size} but layout.block_size={self.block_size}: they must agree; leave block_size out."
            )
        for name, layout, axis in (("layout", self.layout, 0), ("kv_layout", self.kv_layout, 1)):
            if layout is None:
                continue
            if layout.block_size != self.block_size:
                raise ValueError(
                    f"{name}.block_size={layout.block_size} differs from {self.block_size}: both layouts must use one block "
                    "size; rebuild one of them."
                )
            if self.num_blocks is not None and self.num_blocks[axis] != layout.num_blocks:
                assert self.layout is not None
                assert self.kv_layout is not None
                tokens = (self.layout.num_tokens, self.kv_layout.num_tokens)
                fits = what_fits(self.num_blocks, layout.block_size, tokens, "TokenLayout")
                raise ValueError(
                    f"base_blockmask has {self.num_blocks[axis]} block {'columns' if axis else 'rows'}, {name} has "
                    f"{layout.num_tokens} tokens in {layout.num_blocks} blocks of {layout.block_size}: they must agree; {fits}."
                )

    def _check_rows(self) -> None:
        used = sorted({s - 1 for s in self.slices if s > 0})
        if used:
            assert self.base_blockmask is not None
            empty = (~self.base_blockmask[:, used].any(-1)).nonzero()
            if len(empty):
                image, position, row = empty[0].tolist()
                raise ValueError(
                    f"query block {row} of image {image}, slice {used[position] + 1} keeps no key block ({len(empty)} such rows): "
                    "every query must see something; keep each block's own key block, or pass allow_empty_rows=True to get 0."
                )
        for head, kind in enumerate(self.slices):
            if kind == STREAMING and sum(self.streaming[head]) == 0:
                raise ValueError(
                    f"streaming head {head} has sink=0 and local=0, so it keeps no key block: give it at least one block in "
                    "streaming_info, or pass allow_empty_rows=True to get 0."
                )


DENSE, STREAMING = 0, -1


def check_blockmask(mask: object) -> Tensor:
    """`mask` if it is a (B or 1, S, R, C) bool tensor; TypeError or ValueError otherwise."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"base_blockmask is a {type(mask).__name__}: expected a bool tensor; {instead_of_masks(mask)}."
        )
    if mask.dtype != torch.bool:
        raise TypeError(
            f"base_blockmask has dtype {mask.dtype}: expected torch.bool, True = compute; use mask.bool() for ones and "
            "zeros, mask == 0 for a mask that is added to logits."
        )
    if mask.dim() != 4:
        missing = ", ".join(["None"] * (4 - mask.dim()))
        add = f"add the missing axes, mask[{missing}]" if 2 <= mask.dim() < 4 else "make it so"
        raise ValueError(
            f"base_blockmask has shape {tuple(mask.shape)}: expected (B or 1, S, R, C), one slice per block-sparse head and "
            f"one entry per pair of blocks; {add}."
        )
    return mask


def instead_of_masks(given: object) -> str:
    """The end of a message about what is no mask: what to do with it."""
    first = given[0] if isinstance(given, (tuple, list)) and given else given
    if isinstance(first, Tensor) and first is not given:
        if first.dim() == 4:
            return "unpack what a generator returned, bsa.HeadMasks(*generated)"
        return "stack one (R, C) mask per head, bsa.HeadMasks(masks.stack_heads(list, 1))"
    if isinstance(given, Tensor):
        return "wrap a base_blockmask as bsa.HeadMasks(base_blockmask, head_mask_type)"
    if isinstance(given, HeadMasks):
        return "use the HeadMasks as it is"
    if isinstance(first, (Pattern, str)) or callable(first):
        return "lay patterns out with bsa.HeadMasks.from_patterns(layout, patterns)"
    return "convert an array with torch.as_tensor, or make masks of patterns with bsa.HeadMasks.from_patterns"


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


def _resolve_streaming(
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

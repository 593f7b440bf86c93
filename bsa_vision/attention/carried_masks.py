"""Store masks in a tensor, so that exported programs (torch.export, torch.jit.trace) contain them.

A saved program runs in other processes, which do not have the objects of this one. The tensor is a
constant of the program: (n,) uint8, one line of JSON followed by binary data. `read` undoes
`carry`, and caches by content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_source import MaskSource, from_handle
from bsa_vision.masks import TokenLayout
from bsa_vision.storage.memory_cache import Cache

FORMAT, VERSION = "bsa-vision/masks", 2
Grid = tuple[int, int]


def is_recording() -> bool:
    """Return whether this call is recorded into a program that may outlive the process.

    torch.export, make_fx and torch.jit.trace do so; torch.compile keeps its graphs in the process.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or get_proxy_mode() is not None


@contextmanager
def outside_of_tracing() -> Iterator[None]:
    """Compute with real tensors inside a trace and record nothing, for constants and caches."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with (
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def plain_sizes(*sizes: int) -> tuple[int, ...]:
    """Return sizes as ints; under torch.jit.trace they are tensors."""
    if not torch.jit.is_tracing():
        return sizes
    with outside_of_tracing():
        return tuple(map(int, sizes))


def plain_number(value: float) -> float:
    """Return a number computed from sizes as a float; under torch.jit.trace it is a tensor."""
    if not torch.jit.is_tracing():
        return value
    with outside_of_tracing():
        return float(value)


def carried(source: MaskSource, grid: Grid, num_keys: int) -> Tensor:
    """Return the masks of `source` at `grid` as an (n,) uint8 tensor on the CPU.

    A symbolic grid requests masks for any grid. Raises ValueError if these cannot be stored.
    """
    if torch.compiler.is_dynamo_compiling():
        return _by_handle(source.handle, int(grid[0]), int(grid[1]), int(num_keys))
    with outside_of_tracing():
        return torch.frombuffer(bytearray(carry(source, grid, num_keys)), dtype=torch.uint8)


@torch.compiler.assume_constant_result
def _by_handle(handle: int, height: int, width: int, num_keys: int) -> Tensor:
    with outside_of_tracing():
        data = carry(from_handle(handle), (height, width), num_keys)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def read(tensor: Tensor) -> Any:
    """Return an object with `masks_for(grid, num_keys)` from a tensor made by `carried`."""
    data = tensor.cpu().numpy().tobytes()
    return _read.get(data, lambda: _parse(data))


_read: Cache[Any] = Cache(512)


def _parse(data: bytes) -> Any:
    line, _, payload = data.partition(b"\n")
    header = json.loads(line)
    if header.pop("format", None) != FORMAT or header.pop("version", None) != VERSION:
        raise RuntimeError(
            "this program contains masks in a format that this bsa-vision does not read: "
            f"{line[:80]!r}; expected {FORMAT} version {VERSION}. Export it again, or use the "
            "bsa-vision version that exported it."
        )
    return READERS[header.pop("kind")](header, payload)


def encode(kind: str, header: dict[str, Any], payload: bytes = b"") -> bytes:
    """Return the bytes that `READERS[kind]` reads."""
    text = json.dumps({"format": FORMAT, "version": VERSION, "kind": kind, **header})
    return text.encode() + b"\n" + payload


@singledispatch
def carry(source: Any, grid: Grid, num_keys: int) -> bytes:
    """Return the masks of `source` at `grid`, which may be symbolic (`is_symbolic`), as bytes."""
    raise TypeError(f"masks of type {type(source).__name__} cannot be stored in a program")


@carry.register
def _(source: HeadMasks, grid: Grid, num_keys: int) -> bytes:
    blocks = source.base_blockmask
    header: dict[str, Any] = {
        "shape": None if blocks is None else list(blocks.shape),
        "head_mask_type": source.head_mask_type.tolist(),
        "streaming": [number for pair in source.streaming for number in pair] or None,
        "layouts": [None if x is None else asdict(x) for x in (source.layout, source.kv_layout)],
        "block_size": source.block_size,
    }
    bits = b"" if blocks is None else np.packbits(blocks.cpu().numpy()).tobytes()
    return encode("heads", header, bits)


def _head_masks(header: dict[str, Any], payload: bytes) -> HeadMasks:
    blocks = None
    if header["shape"] is not None:
        count = int(np.prod(header["shape"]))
        bits = np.unpackbits(np.frombuffer(payload, np.uint8), count=count)
        blocks = torch.from_numpy(bits.astype(bool)).reshape(header["shape"])
    layout, kv_layout = (None if x is None else TokenLayout(**x) for x in header["layouts"])
    return HeadMasks(
        blocks,
        header["head_mask_type"],
        header["streaming"],
        layout=layout,
        kv_layout=kv_layout,
        block_size=header["block_size"],
        allow_empty_rows=True,
    )


# kind of masks -> function that reads them; other modules register theirs
READERS: dict[str, Callable[[dict[str, Any], bytes], Any]] = {"heads": _head_masks}


def is_symbolic(grid: Grid) -> bool:
    """Return whether the height or width of a grid is dynamic in the program."""
    return any(isinstance(side, torch.SymInt) for side in grid)


@torch.library.custom_op("bsa_vision::expect_size", mutates_args=())
def expect_size_op(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return a copy of (..., H, W) pixels; raise ValueError unless they have the traced size."""
    if pixels.shape[-2:] != (height, width):
        raise ValueError(
            f"this program was traced with images of {height} x {width} pixels and contains masks "
            f"for that size only, got {pixels.shape[-2]} x {pixels.shape[-1]}: resize the images, "
            "or trace it again at this size."
        )
    return pixels.clone()


@expect_size_op.register_fake
def _(pixels: Tensor, height: int, width: int) -> Tensor:
    return torch.empty_like(pixels)


expect_size_op.register_autograd(lambda ctx, grad: (grad, None, None))

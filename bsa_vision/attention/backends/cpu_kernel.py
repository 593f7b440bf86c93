"""Load and call the compiled inner loop of `gather` (cpu_kernel.cpp).

The loop is built when bsa-vision is installed, if a C++ compiler is available. Without it,
`gather` runs the same arithmetic in torch.

Constraints: x86-64 CPU with AVX2 or AVX-512; computes in float32 (float64 runs in torch); not
causal; no dropout.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsa_vision.attention.backends.problem import Problem, Result, Span
from bsa_vision.attention.backends.workers import run_tasks, scratch
from bsa_vision.attention.block_lists import KeyRanges

INTERFACE = 2  # of cpu_kernel.cpp
TASKS_PER_THREAD = 8  # rows of blocks differ in cost; several tasks per thread balance the load
CHUNK, LANES, VECTORS = 128, 16, 4  # the largest values in cpu_kernel.cpp
KEY_SIDE = {"k", "v", "grad_k", "grad_v"}  # tensors with one row per key
# CPU capability as torch names it -> suffix of the compiled functions. ATEN_CPU_CAPABILITY lowers
# it, as for torch itself.
VARIANTS = {"AVX512": "avx512", "AVX2": "avx2"}

# Fields of `struct Batch`, in order
MATRICES = ("q", "k", "v", "out", "lse", "rel_h", "rel_w")
GRADIENTS = ("grad_out", "grad_q", "grad_k", "grad_v", "grad_rel_h", "grad_rel_w")
INDICES = ("key_row", "key_column", "order_q", "order_k")
POINTERS = (*INDICES, "row_start", "row_ptr", "key_ranges", "scratch")
DIMS = ("dim", "dim_v", "rel_rows", "rel_columns")
NUMBERS = ("heads", "group", "rows", "mask_image_stride", *DIMS, "first", "last")


class _Matrix(ctypes.Structure):
    """`struct Matrix` of cpu_kernel.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("image", "head", "token")),
    ]


class _Batch(ctypes.Structure):
    """`struct Batch` of cpu_kernel.cpp."""

    _fields_ = [(name, _Matrix) for name in (*MATRICES, *GRADIENTS)]
    _fields_ += [(name, ctypes.c_void_p) for name in POINTERS]
    _fields_ += [(name, ctypes.c_int64) for name in NUMBERS]
    _fields_ += [("scale", ctypes.c_float)]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """Return the compiled library, or the reason why it is missing.

    BSA_VISION_COMPILED=0 in the environment switches it off, for comparisons.
    """
    if os.environ.get("BSA_VISION_COMPILED") == "0":
        return "the compiled loop is switched off by BSA_VISION_COMPILED=0"
    found = importlib.util.find_spec("bsa_vision.attention.backends._cpu_kernel")
    if found is None or found.origin is None:
        return "the compiled loop was not built: no C++ compiler at installation"
    try:
        loaded = ctypes.CDLL(found.origin)
        loaded.attend_interface.restype = ctypes.c_int64
        built_for = loaded.attend_interface()
    except OSError as error:
        return f"the compiled loop does not load: {error}"
    except AttributeError:  # nothing is compiled for other processors, or a very old build
        return "the compiled loop needs x86-64 with AVX2 or AVX-512 and was built without them"
    if built_for != INTERFACE * 10000 + ctypes.sizeof(_Batch):
        return "the compiled loop was built for another version of bsa-vision: reinstall bsa-vision"
    return loaded


@lru_cache(maxsize=4)
def variant(capability: str) -> tuple[Callable[[Any], None], Callable[[Any], None]] | str:
    """Return (forward, gradient) for a CPU capability, or the reason why there are none.

    capability  as torch names it; `VARIANTS` lists the supported ones
    """
    loaded = library()
    if isinstance(loaded, str):
        return loaded
    if capability not in VARIANTS or not hasattr(loaded, f"attend_{VARIANTS[capability]}"):
        needed = "the compiled loop needs x86-64 with AVX2 or AVX-512"
        return f"{needed}, this CPU's capability is {capability}"
    functions = [
        getattr(loaded, f"{name}_{VARIANTS[capability]}") for name in ("attend", "attend_gradient")
    ]
    for function in functions:
        function.argtypes, function.restype = [ctypes.POINTER(_Batch)], None
    return functions[0], functions[1]


def why_not(problem: Problem | None = None) -> str | None:
    """Return why the compiled loop cannot run `problem` (None: any call); None if it can."""
    if problem is not None:
        if problem.q.device.type != "cpu":
            return f"the compiled loop runs on CPUs, the tensors are on {problem.q.device}"
        if problem.compute_dtype != torch.float32:
            return f"the compiled loop computes in float32, the call is {problem.q.dtype}"
        if problem.is_causal or problem.dropout_p:
            return "the compiled loop supports neither causality nor dropout"
    functions = variant(torch.backends.cpu.get_cpu_capability())
    return functions if isinstance(functions, str) else None


def flavour(problem: Problem) -> str:
    """Name the implementation of `gather` that runs `problem`."""
    if why_not(problem):
        return "in torch"
    return f"compiled for {torch.backends.cpu.get_cpu_capability()}"


def outruns_dense(problem: Problem) -> bool:
    """Return whether the loop is faster than torch's attention even if no block is skipped.

    The limit was measured with AVX2 and AVX-512.
    """
    return problem.max_seqlen_k >= 1024 and why_not(problem) is None


def run(problem: Problem) -> Result:
    """Compute `problem`."""
    tensors = _inputs(problem)
    tensors["out"] = out = torch.empty_like(problem.empty_out(), dtype=torch.float32)
    lse = problem.empty_lse() if problem.return_lse else None
    tasks = []
    for images in _batches(problem):
        batch, table = _describe(problem, tensors, images)
        if lse is not None:
            batch.lse = _matrix(lse[images.first : images.last, :, :, None])
        floats = batch.dim + batch.dim_v + 2 + batch.rel_rows + batch.rel_columns
        units = len(images) * batch.heads * batch.rows
        tasks += _tasks(batch, 0, units, images.width * floats, (tensors, lse, table, problem))
    run_tasks(tasks, out.device)
    return Result(out.to(problem.q.dtype), lse)


def gradients(problem: Problem, out: Tensor, grad_out: Tensor) -> list[Tensor]:
    """Return the gradients of q, k, v and, if given, rel_h and rel_w, shaped like the tensors."""
    tensors = _inputs(problem)
    tensors |= {"out": _rows_adjacent(out), "grad_out": _rows_adjacent(grad_out)}
    names = [name for name in ("q", "k", "v", "rel_h", "rel_w") if name in tensors]
    for name in names:
        *shape, dim = tensors[name].shape
        # Key gradients are accumulated in whole vectors; query gradients are written once.
        padded = _whole_vectors(dim) if name in KEY_SIDE else dim
        tensors[f"grad_{name}"] = torch.zeros(
            *shape, padded, dtype=torch.float32, device=out.device
        )
    tasks = []
    for images in _batches(problem):
        batch, table = _describe(problem, tensors, images)
        floats = 2 * (batch.dim + batch.dim_v + batch.rel_rows + batch.rel_columns) + 3 + 2 * CHUNK
        floats += _whole_vectors(batch.dim) + _whole_vectors(batch.dim_v)
        # One unit per key head: the query heads of a group accumulate into the same keys, and no
        # two tasks may write to the same memory.
        units = len(images) * batch.heads // batch.group
        tasks += _tasks(batch, 1, units, images.width * floats, (tensors, table, problem))
    run_tasks(tasks, out.device)
    grads = [tensors[f"grad_{name}"][..., : tensors[name].shape[-1]] for name in names]
    return [grad.to(problem.q.dtype).contiguous() for grad in grads]


class _Images(NamedTuple):
    """Images `first` to `last` - 1 of the batch, all with the same number of tokens."""

    first: int
    last: int
    span: Span  # of the first image
    width: int  # queries of one block, rounded up to whole vectors

    def __len__(self) -> int:
        return self.last - self.first


def _batches(problem: Problem) -> Iterator[_Images]:
    """Yield the batch as a whole, or image by image if it is ragged."""
    for span in problem.spans():
        width = _whole_vectors(min(problem.masks.block_size, span.q.stop - span.q.start))
        if not problem.ragged:
            yield _Images(0, problem.num_images, span, width)
            return
        yield _Images(span.image, span.image + 1, span, width)


def _inputs(problem: Problem) -> dict[str, Tensor]:
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v}
    if problem.rel_pos is not None:
        inputs |= problem.rel_pos._asdict()
    for name, x in inputs.items():
        if x.dtype != torch.float32 or x.stride(-1) != 1:
            inputs[name] = _rows_adjacent(x)
    return inputs


def _rows_adjacent(x: Tensor) -> Tensor:
    """Return `x` in float32 with stride 1 along the last axis; other strides are kept."""
    x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _whole_vectors(dim: int) -> int:
    return -(-dim // LANES) * LANES


def _describe(
    problem: Problem, tensors: dict[str, Tensor], images: _Images
) -> tuple[_Batch, KeyRanges]:
    """Describe the images without a range of work and scratch memory.

    Also returns the table that the description points into.
    """
    span, masks, rel_pos = images.span, problem.masks, problem.rel_pos
    rows = slice(span.row, span.row + len(images))
    parts = {
        name: x[rows, :, span.k if name in KEY_SIDE else span.q] for name, x in tensors.items()
    }
    table = masks.key_ranges(span.q.stop - span.q.start, span.k.stop - span.k.start)
    indices = {name: getattr(problem, name) for name in INDICES}
    batch = _Batch(
        **{name: _matrix(x) for name, x in parts.items()},
        **{name: None if x is None else x.data_ptr() for name, x in indices.items()},
        row_start=table.row_start.data_ptr(),
        row_ptr=table.row_ptr[problem.mask_image(span.image)].data_ptr(),
        key_ranges=table.ranges.data_ptr(),
        heads=problem.num_heads,
        group=problem.group,
        rows=len(table.row_start) - 1,
        mask_image_stride=table.row_ptr.stride(0) if len(table.row_ptr) > 1 else 0,
        dim=problem.q.shape[-1],
        dim_v=problem.v.shape[-1],
        rel_rows=0 if rel_pos is None else rel_pos.rel_h.shape[-1],
        rel_columns=0 if rel_pos is None else rel_pos.rel_w.shape[-1],
        scale=problem.scale,
    )
    return batch, table


def _matrix(x: Tensor) -> _Matrix:
    """Describe an (images, heads, tokens, dim) tensor."""
    return _Matrix(x.data_ptr(), *x.stride()[:3])


def _tasks(
    batch: _Batch, direction: int, units: int, floats: int, alive: tuple[Any, ...]
) -> list[Callable[[], None]]:
    """Split a batch into tasks of about equal size.

    direction  0 forward, 1 gradient
    units      rows of blocks (forward) or key heads (gradient) of all images
    floats     scratch memory per task, without the buffer of one chunk of logits
    alive      what the batch points into. Tasks keep it alive: caches may drop their tables, and
               an interrupted caller may return while its last tasks still run
    """
    step = max(1, -(-units // (TASKS_PER_THREAD * torch.get_num_threads())))
    functions = variant(torch.backends.cpu.get_cpu_capability())
    assert not isinstance(functions, str), functions

    def task(first: int, alive: tuple[Any, ...]) -> None:
        part = _Batch.from_buffer_copy(batch)
        part.first, part.last = first, min(first + step, units)
        size = floats + CHUNK * VECTORS * LANES
        memory = scratch("attend", (size,), torch.float32, torch.device("cpu"))
        part.scratch = memory.data_ptr()
        functions[direction](ctypes.byref(part))

    return [partial(task, first, alive) for first in range(0, units, step)]

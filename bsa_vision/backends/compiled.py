"""The compiled inner loop of `gather` (attend.cpp): whether it is here, and how it is called.

Built when bsa-vision is installed, where a C++ compiler is at hand; without it, `gather` runs the same arithmetic in torch.
Constraints: x86-64 CPU with AVX2 or AVX-512, float32 arithmetic (float64 is for torch), not causal, no dropout.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bsa_vision.backends.problem import Problem, Result, Span
from bsa_vision.backends.workers import run_tasks, scratch

TASKS_PER_THREAD = 8  # rows of blocks cost unequal amounts; several tasks a thread even that out
CHUNK, LANES, VECTORS = 128, 16, 4  # the widest that attend.cpp uses
# torch's name of what the machine can do -> the function made for it. ATEN_CPU_CAPABILITY lowers it, as for torch's own.
VARIANTS = {"AVX512": "attend_avx512", "AVX2": "attend_avx2"}

POINTERS = ("q", "k", "v", "out", "lse", "rel_h", "rel_w", "key_row", "key_column", "order_q", "order_k")
POINTERS += ("bounds", "run_at", "runs", "scratch")
NUMBERS = ("q_stride", "k_stride", "v_stride", "out_stride", "rel_h_stride", "rel_w_stride")
NUMBERS += ("dim", "dim_v", "rel_rows", "rel_columns", "first", "last")


class _Attend(ctypes.Structure):
    """`struct Attend` of attend.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]
    _fields_ += [(name, ctypes.c_int64) for name in NUMBERS]
    _fields_ += [("scale", ctypes.c_float)]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    found = importlib.util.find_spec("bsa_vision.backends._attend")
    if found is None or found.origin is None:
        return "the compiled loop was not built: no C++ compiler was at hand when bsa-vision was installed"
    try:
        return ctypes.CDLL(found.origin)
    except OSError as error:
        return f"the compiled loop does not load: {error}"


@lru_cache(maxsize=4)
def variant(capability: str) -> Callable[[Any], None] | str:
    """The function for machines of this capability (one of `VARIANTS`), or why there is none."""
    loaded = library()
    if isinstance(loaded, str):
        return loaded
    if capability not in VARIANTS or not hasattr(loaded, VARIANTS[capability]):
        return f"the compiled loop is for x86-64 with AVX2 or AVX-512, this machine's capability is {capability}"
    function = getattr(loaded, VARIANTS[capability])
    function.argtypes, function.restype = [ctypes.POINTER(_Attend)], None
    return function


def why_not(problem: Problem | None = None) -> str | None:
    """Why the compiled loop cannot run `problem` (None: any), in one sentence."""
    if problem is not None:
        if problem.q.device.type != "cpu":
            return f"the compiled loop is for CPUs, the tensors are on {problem.q.device}"
        if problem.compute_dtype != torch.float32:
            return f"the compiled loop computes in float32, the call is {problem.q.dtype}"
        if problem.is_causal or problem.dropout_p:
            return "the compiled loop knows neither causality nor dropout"
    function = variant(torch.backends.cpu.get_cpu_capability())
    return function if isinstance(function, str) else None


def outruns_dense(problem: Problem) -> bool:
    """Whether the loop is faster than torch's own attention even where no block is skipped, as measured on AVX2 and AVX-512."""
    return problem.longest_k >= 2048 and why_not(problem) is None


def run(problem: Problem) -> Result:
    q, k, v, *rel_pos = (_rows_adjacent(x) for x in (problem.q, problem.k, problem.v, *(problem.rel_pos or ())))
    out = torch.empty_like(problem.empty_out(), dtype=torch.float32)
    lse = problem.empty_lse() if problem.return_lse else None
    tensors = (q, k, v, out, *rel_pos)
    chunks = -(-TASKS_PER_THREAD * torch.get_num_threads() // (problem.num_heads * problem.num_images))
    tasks = []
    for span in problem.spans():
        num_rows = -(-(span.q.stop - span.q.start) // problem.masks.block_size)
        step = max(1, -(-num_rows // chunks))
        for head in range(problem.num_heads):
            tasks += [
                partial(_rows, problem, tensors, lse, span, head, first, min(first + step, num_rows))
                for first in range(0, num_rows, step)
            ]
    run_tasks(tasks, q.device)
    return Result(out.to(problem.q.dtype), lse)


def _rows_adjacent(x: Tensor) -> Tensor:
    """float32 with the elements of a token adjacent; any other stride is taken as it is."""
    x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(
    problem: Problem, tensors: tuple[Tensor, ...], lse: Tensor | None, span: Span, head: int, first: int, last: int
) -> None:
    """Compute rows of blocks `first` to `last` of one head of one image."""
    at_q, at_k = (span.row, head, span.q), (span.row, head // problem.group, span.k)
    q, k, v, out = (x[at] for x, at in zip(tensors, (at_q, at_k, at_k, at_q)))
    rel_h, rel_w = (x[at_q] for x in tensors[4:]) if tensors[4:] else (None, None)
    table = problem.masks.run_table(q.shape[0], k.shape[0])
    rel_sides = (0, 0) if rel_h is None or rel_w is None else (rel_h.shape[1], rel_w.shape[1])
    width = -(-min(problem.masks.block_size, len(q)) // LANES) * LANES
    floats = width * (q.shape[1] + v.shape[1] + 2 + sum(rel_sides)) + CHUNK * VECTORS * LANES
    memory = scratch("attend", (floats,), torch.float32, q.device)
    call = _Attend(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=None if lse is None else lse[span.image, head].data_ptr(),
        rel_h=_pointer(rel_h),
        rel_w=_pointer(rel_w),
        key_row=_pointer(problem.key_row),
        key_column=_pointer(problem.key_column),
        order_q=_pointer(problem.order_q),
        order_k=_pointer(problem.order_k),
        bounds=table.bounds.data_ptr(),
        run_at=table.run_at[problem.mask_image(span.image), head].data_ptr(),
        runs=table.runs.data_ptr(),
        scratch=memory.data_ptr(),
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        out_stride=out.stride(0),
        rel_h_stride=0 if rel_h is None else rel_h.stride(0),
        rel_w_stride=0 if rel_w is None else rel_w.stride(0),
        dim=q.shape[1],
        dim_v=v.shape[1],
        rel_rows=rel_sides[0],
        rel_columns=rel_sides[1],
        first=first,
        last=last,
        scale=problem.scale,
    )
    function = variant(torch.backends.cpu.get_cpu_capability())
    assert not isinstance(function, str), function
    function(ctypes.byref(call))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()

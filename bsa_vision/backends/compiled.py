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
# torch's name of what the machine can do -> the suffix of the functions made for it. ATEN_CPU_CAPABILITY lowers it, as for torch's own.
VARIANTS = {"AVX512": "avx512", "AVX2": "avx2"}

POINTERS = "q k v out lse rel_h rel_w key_row key_column order_q order_k bounds run_at runs scratch"
POINTERS += " grad_out grad_q grad_k grad_v grad_rel_h grad_rel_w"
NUMBERS = "q_stride k_stride v_stride out_stride rel_h_stride rel_w_stride grad_out_stride grad_k_stride grad_v_stride"
NUMBERS += " dim dim_v rel_rows rel_columns first last"


class _Attend(ctypes.Structure):
    """`struct Attend` of attend.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS.split()]
    _fields_ += [(name, ctypes.c_int64) for name in NUMBERS.split()]
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
def variant(capability: str) -> tuple[Callable[[Any], None], Callable[[Any], None]] | str:
    """(forward, gradient) for machines of this capability (one of `VARIANTS`), or why there are none."""
    loaded = library()
    if isinstance(loaded, str):
        return loaded
    if capability not in VARIANTS or not hasattr(loaded, f"attend_{VARIANTS[capability]}"):
        return f"the compiled loop is for x86-64 with AVX2 or AVX-512, this machine's capability is {capability}"
    functions = [getattr(loaded, f"{name}_{VARIANTS[capability]}") for name in ("attend", "attend_gradient")]
    for function in functions:
        function.argtypes, function.restype = [ctypes.POINTER(_Attend)], None
    return functions[0], functions[1]


def why_not(problem: Problem | None = None) -> str | None:
    """Why the compiled loop cannot run `problem` (None: any), in one sentence."""
    if problem is not None:
        if problem.q.device.type != "cpu":
            return f"the compiled loop is for CPUs, the tensors are on {problem.q.device}"
        if problem.compute_dtype != torch.float32:
            return f"the compiled loop computes in float32, the call is {problem.q.dtype}"
        if problem.is_causal or problem.dropout_p:
            return "the compiled loop knows neither causality nor dropout"
    functions = variant(torch.backends.cpu.get_cpu_capability())
    return functions if isinstance(functions, str) else None


def outruns_dense(problem: Problem) -> bool:
    """Whether the loop is faster than torch's own attention even where no block is skipped, as measured on AVX2 and AVX-512."""
    return problem.longest_k >= 2048 and why_not(problem) is None


def run(problem: Problem) -> Result:
    inputs = _inputs(problem)
    inputs["out"] = out = torch.empty_like(problem.empty_out(), dtype=torch.float32)
    lse = problem.empty_lse() if problem.return_lse else None
    chunks = -(-TASKS_PER_THREAD * torch.get_num_threads() // (problem.num_heads * problem.num_images))
    tasks = []
    for span in problem.spans():
        num_rows = -(-(span.q.stop - span.q.start) // problem.masks.block_size)
        step = max(1, -(-num_rows // chunks))
        for head in range(problem.num_heads):
            tasks += [
                partial(_forward, problem, inputs, lse, span, head, first, min(first + step, num_rows))
                for first in range(0, num_rows, step)
            ]
    run_tasks(tasks, out.device)
    return Result(out.to(problem.q.dtype), lse)


def gradients(problem: Problem, out: Tensor, grad_out: Tensor) -> list[Tensor]:
    """The gradients of q, k, v and, where there are any, rel_h and rel_w; each shaped like its tensor."""
    inputs = _inputs(problem)
    inputs |= {"out": _rows_adjacent(out), "grad_out": _rows_adjacent(grad_out)}
    names = [name for name in ("q", "k", "v", "rel_h", "rel_w") if name in inputs]
    for name in names:
        *shape, dim = inputs[name].shape
        # Keys collect whole vectors from many queries; queries get theirs once.
        inputs[f"grad_{name}"] = torch.zeros(*shape, _whole_vectors(dim) if name in "kv" else dim)
    # Query heads of one group add to the same keys, so a group is one task: no two tasks write to the same place.
    tasks = [
        partial(_backward, problem, inputs, span, range(head, head + problem.group))
        for span in problem.spans()
        for head in range(0, problem.num_heads, problem.group)
    ]
    run_tasks(tasks, out.device)
    grads = [inputs[f"grad_{name}"][..., : inputs[name].shape[-1]] for name in names]
    return [grad.to(problem.q.dtype).contiguous() for grad in grads]


def _inputs(problem: Problem) -> dict[str, Tensor]:
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v}
    if problem.rel_pos is not None:
        inputs |= problem.rel_pos._asdict()
    return {name: _rows_adjacent(x) for name, x in inputs.items()}


def _rows_adjacent(x: Tensor) -> Tensor:
    """float32 with the elements of a token adjacent; any other stride is taken as it is."""
    x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _whole_vectors(dim: int) -> int:
    return -(-dim // LANES) * LANES


def _forward(
    problem: Problem, inputs: dict[str, Tensor], lse: Tensor | None, span: Span, head: int, first: int, last: int
) -> None:
    """Compute rows of blocks `first` to `last` of one head of one image."""
    call = _call(problem, inputs, span, head)
    call.first, call.last = first, last
    call.lse = None if lse is None else lse[span.image, head].data_ptr()
    width = _whole_vectors(min(problem.masks.block_size, span.q.stop - span.q.start))
    _run(call, 0, width * (call.dim + call.dim_v + 2 + call.rel_rows + call.rel_columns) + CHUNK * VECTORS * LANES)


def _backward(problem: Problem, inputs: dict[str, Tensor], span: Span, heads: range) -> None:
    """Add the gradients of the query heads of one group."""
    size, tokens = problem.masks.block_size, span.q.stop - span.q.start
    for head in heads:
        call = _call(problem, inputs, span, head)
        call.first, call.last = 0, -(-tokens // size)
        width = _whole_vectors(min(size, tokens))
        columns = 2 * (call.dim + call.dim_v + call.rel_rows + call.rel_columns) + 3 + 2 * CHUNK
        columns += _whole_vectors(call.dim) + _whole_vectors(call.dim_v)
        _run(call, 1, width * columns + CHUNK * VECTORS * LANES)


def _call(problem: Problem, inputs: dict[str, Tensor], span: Span, head: int) -> _Attend:
    """Everything about one head of one image but its rows and scratch memory."""
    of_keys, at_q = head // problem.group, (span.row, head, span.q)
    places = {name: (span.row, of_keys, span.k) if name in ("k", "v", "grad_k", "grad_v") else at_q for name in inputs}
    tensors = {name: x[places[name]] for name, x in inputs.items()}
    table = problem.masks.run_table(span.q.stop - span.q.start, span.k.stop - span.k.start)
    fields: dict[str, Any] = {name: x.data_ptr() for name, x in tensors.items()}
    strides = {f"{name}_stride": x.stride(0) for name, x in tensors.items()}
    fields |= {name: stride for name, stride in strides.items() if name in NUMBERS.split()}
    for name in ("key_row", "key_column", "order_q", "order_k"):
        given = getattr(problem, name)
        fields[name] = None if given is None else given.data_ptr()
    rel_h, rel_w = tensors.get("rel_h"), tensors.get("rel_w")
    return _Attend(
        **fields,
        bounds=table.bounds.data_ptr(),
        run_at=table.run_at[problem.mask_image(span.image), head].data_ptr(),  # a view
        runs=table.runs.data_ptr(),
        dim=tensors["q"].shape[1],
        dim_v=tensors["v"].shape[1],
        rel_rows=0 if rel_h is None else rel_h.shape[1],
        rel_columns=0 if rel_w is None else rel_w.shape[1],
        scale=problem.scale,
    )


def _run(call: _Attend, direction: int, floats: int) -> None:
    functions = variant(torch.backends.cpu.get_cpu_capability())
    assert not isinstance(functions, str), functions
    call.scratch = scratch("attend", (floats,), torch.float32, torch.device("cpu")).data_ptr()
    functions[direction](ctypes.byref(call))

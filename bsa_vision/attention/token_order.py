"""Apply token order: sort the tokens of a call like its masks, run it, restore the order.

Masks in tile order are for tokens sorted by tile (`TokenLayout.permutation`). `restore_tokens`
undoes `order_tokens`, and `restored` undoes `ordered`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from bsa_vision.attention.backends import cpu_kernel, gather
from bsa_vision.attention.backends.problem import Problem, Result
from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.masks import TokenLayout


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached, and later calls may need gradients
def token_index(layout: TokenLayout, device: torch.device, inverse: bool = False) -> Tensor:
    """Return `layout.permutation`, or `layout.inverse`, as (N,) int64 on `device`."""
    return (layout.inverse if inverse else layout.permutation).to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def key_places(layout: TokenLayout, ordered: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the patch row and column of every token, (N,) int64 each, in packed or model order."""
    row, column = (x if ordered else x[layout.inverse] for x in layout.coordinates)
    return row.to(device), column.to(device)


def order_tokens(x: Tensor, layout: TokenLayout | None, dim: int = -2) -> Tensor:
    """Return `x` with axis `dim` in packed order instead of model order."""
    if layout is None or layout.is_identity:
        return x
    return x.index_select(dim, token_index(layout, x.device))


def restore_tokens(x: Tensor, layout: TokenLayout | None, dim: int = -2) -> Tensor:
    """Return `x` with axis `dim` in model order instead of packed order."""
    if layout is None or layout.is_identity:
        return x
    return x.index_select(dim, token_index(layout, x.device, inverse=True))


def ordered(problem: Problem, *, rel_pos: bool = True) -> Problem:
    """Return `problem` with its tokens in packed order.

    rel_pos  whether to order relative position too; if not, `order_q` has the order of its rows
    """
    layout, kv_layout = problem.masks.orders
    if layout is None and kv_layout is None and problem.rel_pos is None:
        return problem
    terms, order_q = problem.rel_pos, None
    if terms is not None and rel_pos:
        terms = RelPos(*(order_tokens(term, layout) for term in terms))
    elif terms is not None and layout is not None:
        order_q = token_index(layout, problem.q.device)
    key_row, key_column = _key_places(problem, ordered=kv_layout is not None)
    return replace(
        problem,
        q=order_tokens(problem.q, layout),
        k=order_tokens(problem.k, kv_layout),
        v=order_tokens(problem.v, kv_layout),
        rel_pos=terms,
        order_q=order_q,
        key_row=key_row,
        key_column=key_column,
    )


def restored(result: Result, problem: Problem) -> Result:
    """Return the result of `ordered(problem)` in model order."""
    layout = problem.masks.orders[0]
    if layout is None:
        return result
    # In memory (B, N, H, D), the layout that output projections read.
    out = restore_tokens(result.out.transpose(1, 2), layout, dim=1).transpose(1, 2)  # (B, H, N, D)
    lse = None if result.lse is None else restore_tokens(result.lse, layout, dim=-1)
    return Result(out, lse, result.probs)


def with_order(problem: Problem) -> Problem:
    """Return `problem` in model order, with the orders for a kernel that gathers tokens itself."""
    layout, kv_layout = problem.masks.orders
    if layout is None and kv_layout is None and problem.rel_pos is None:
        return problem
    device = problem.q.device
    key_row, key_column = _key_places(problem, ordered=False)
    return replace(
        problem,
        order_q=None if layout is None else token_index(layout, device),
        order_k=None if kv_layout is None else token_index(kv_layout, device),
        key_row=key_row,
        key_column=key_column,
    )


def _key_places(problem: Problem, ordered: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the patch row and column of every key, or None without relative position."""
    layout = problem.masks.kv_layout
    if problem.rel_pos is None:
        return None, None
    if layout is None:
        raise ValueError(
            "rel_pos needs the patch of each key, and these masks have no layout: pass layout= to "
            "HeadMasks."
        )
    return key_places(layout, ordered, problem.k.device)


# Running a call


def attend(problem: Problem, backend: str) -> Result:
    """Run `problem` on a backend; its tokens and the result are in model order."""
    blocks = problem.masks.base_blockmask
    if blocks is not None and blocks.shape[0] not in (1, problem.num_images):
        raise ValueError(
            f"the masks are for {blocks.shape[0]} images, the batch has {problem.num_images}: "
            "expected masks for one image, or for each; pass one list of prompts per image."
        )
    # Autocast has set the dtype of q, k and v; the backend chooses its own precision.
    with without_autocast(problem.q.device):
        if backend == "gather" and cpu_kernel.why_not(problem) is None:
            return cpu_kernel.run(with_order(problem))
        packed = ordered(problem, rel_pos=backend != "flex")
        return restored(BACKENDS[backend].run(packed), problem)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def gradients(problem: Problem, out: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and, if given, rel_h and rel_w, computed by `gather`."""
    with without_autocast(out.device):
        if cpu_kernel.why_not(problem) is None:
            return tuple(cpu_kernel.gradients(with_order(problem), out, grad_out))
        layout, kv_layout = problem.masks.orders
        out, grad_out = (order_tokens(x, layout) for x in (out, grad_out))
        grads = gather.gradients(ordered(problem), out, grad_out)
        layouts = (layout, kv_layout, kv_layout, layout, layout)
        return tuple(restore_tokens(x, order) for x, order in zip(grads, layouts) if x is not None)

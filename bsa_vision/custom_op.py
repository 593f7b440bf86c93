"""The boundary for torch.compile: block-sparse attention as one operator, and its gradient as another.

What is Python about a call (masks, cached block lists, token order, the choice of a backend) happens inside, at run time;
a compiler sees tensors and numbers. Masks travel as the handle of a living object, as the kernel's three tensors, or,
in programs that are saved, as one tensor that holds them (`carried_masks`).
"""

# No `from __future__ import annotations` here: torch reads the operators' schemas from these annotations.
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bsa_vision.arguments import check_fit
from bsa_vision.backends import BACKENDS, Problem, Result, choose, compiled, gather, why_not
from bsa_vision.backends.once import refuse_second_derivative
from bsa_vision.carried_masks import read
from bsa_vision.errors import BackendUnavailable
from bsa_vision.head_masks import HeadMasks, from_handle
from bsa_vision.packing import key_places, order_tokens, restore_tokens, token_index
from bsa_vision.rel_pos import RelPos
from masks import TokenLayout


def attend(problem: Problem, backend: str) -> Result:
    """Run `problem`, whose tokens are in model order, on the named backend; results come back in model order."""
    blocks = problem.masks.base_blockmask
    if blocks is not None and blocks.shape[0] not in (1, problem.num_images):
        raise ValueError(
            f"the masks are for {blocks.shape[0]} images, the batch has {problem.num_images}: one for all, or one for each image, is "
            "needed; give as many prompts as images."
        )
    # Autocast has done its work on what made q, k and v; inside, precision is the backend's own business.
    with _without_autocast(problem.q.device):
        if backend == "gather" and compiled.why_not(problem) is None:
            return gather.run(_with_order(problem))
        layout, _ = _layouts(problem)
        out, lse, probs = BACKENDS[backend].run(_ordered(problem, rel_pos=backend != "flex"))
    if layout is not None:
        # Token by token in memory, as backends lay it out and projections read it.
        out = restore_tokens(out.transpose(1, 2), layout, dim=1).transpose(1, 2)  # (B, H, N, D)
        lse = None if lse is None else restore_tokens(lse, layout, dim=-1)
    return Result(out, lse, probs)


def needs_operator(problem: Problem) -> bool:
    """Return whether `gather` must run as an operator: for its gradient, and for what only sees operators.

    That is transforms of torch.func, dispatch modes and tensor subclasses. A plain call costs less, and a daemon thread
    that computes while the interpreter exits ends cleanly in it, where an operator may read what torch has freed.
    """
    kinds = {type(x) for x in (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))}
    return (
        problem.needs_gradient
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
        or not kinds <= {Tensor, Parameter}
    )


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _layouts(problem: Problem) -> tuple[TokenLayout | None, TokenLayout | None]:
    """The layouts whose order queries and keys must take; None where that changes nothing but the time."""
    masks = problem.masks
    if masks.all_dense:
        return None, None
    layout, kv_layout = (x if x is not None and not x.is_identity else None for x in (masks.layout, masks.kv_layout))
    return layout, kv_layout


def _with_order(problem: Problem) -> Problem:
    """`problem` in model order, with the order for the loop that finds its tokens anywhere."""
    device = problem.q.device
    order_q, order_k = (None if x is None else token_index(x, device) for x in _layouts(problem))
    key_row, key_column = _key_places(problem, ordered=False)
    return replace(problem, order_q=order_q, order_k=order_k, key_row=key_row, key_column=key_column)


def _ordered(problem: Problem, rel_pos: bool = True) -> Problem:
    """`problem` with its tokens in packed order; without `rel_pos` that one stays in model order, with the order to find it by."""
    layout, kv_layout = _layouts(problem)
    terms, order_q = problem.rel_pos, None
    if terms is not None and rel_pos:
        terms = RelPos(*(order_tokens(term, layout) for term in terms))
    elif terms is not None and layout is not None:
        order_q = token_index(layout, problem.q.device)
    q = order_tokens(problem.q, layout)
    k, v = (order_tokens(x, kv_layout) for x in (problem.k, problem.v))
    key_row, key_column = _key_places(problem, ordered=kv_layout is not None)
    return replace(problem, q=q, k=k, v=v, rel_pos=terms, order_q=order_q, key_row=key_row, key_column=key_column)


def _key_places(problem: Problem, ordered: bool) -> tuple[Tensor | None, Tensor | None]:
    """Patch row and column of every key, (Nk,) each, in packed or model order; needed by relative position only."""
    layout = problem.masks.kv_layout
    if problem.rel_pos is None:
        return None, None
    if layout is None:
        raise ValueError("rel_pos with masks that have no layout: it says which patch each key is; make them for one.")
    return key_places(layout, ordered, problem.k.device)


class OpArgs(NamedTuple):
    """The arguments of `attention_op`, by name; torch hands them around as a flat tuple."""

    q: Tensor
    k: Tensor
    v: Tensor
    rel_h: Tensor | None
    rel_w: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    head_mask_type: Tensor | None
    streaming_info: Tensor | None
    base_blockmask: Tensor | None
    carried: Tensor | None
    seed: Tensor | None
    handle: int
    grid_h: int
    grid_w: int
    max_q: int
    max_k: int
    scale: float
    is_causal: bool
    exact_streaming: bool
    dropout_p: float
    return_lse: bool
    backend: str

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self[: self._fields.index("handle")]

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self[self._fields.index("handle") :]


@torch.library.custom_op("bsa_vision::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    head_mask_type: Tensor | None,
    streaming_info: Tensor | None,
    base_blockmask: Tensor | None,
    carried: Tensor | None,
    seed: Tensor | None,
    handle: int,
    grid_h: int,
    grid_w: int,
    max_q: int,
    max_k: int,
    scale: float,
    is_causal: bool,
    exact_streaming: bool,
    dropout_p: float,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the attention of (B, H, N, D) tensors in model order.

    carried holds the masks of a saved program; else handle > 0 names a `HeadMasks`, or whatever else has
    `masks_for(grid, number of keys)`; else the three mask tensors do.
    cu_seqlens None is a uniform batch. lse is (images, H, longest), empty unless asked for. seed (1,) int64 draws the
    dropout mask; it comes from outside, so that a compiler sees two calls with dropout as two different calls.
    """
    arguments = OpArgs(
        q,
        k,
        v,
        rel_h,
        rel_w,
        cu_seqlens_q,
        cu_seqlens_k,
        head_mask_type,
        streaming_info,
        base_blockmask,
        carried,
        seed,
        handle,
        grid_h,
        grid_w,
        max_q,
        max_k,
        scale,
        is_causal,
        exact_streaming,
        dropout_p,
        return_lse,
        backend,
    )
    problem = _problem(arguments)
    backend = choose(problem, backend)
    with _as_outside() if backend == "flex" else nullcontext():
        out, lse, _ = attend(problem, backend)
    return out, q.new_empty(0, dtype=problem.compute_dtype) if lse is None or not return_lse else lse


@attention_op.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    given = OpArgs(*flat)
    q, bounds = given.q, given.cu_seqlens_q
    images, longest = (q.shape[0], q.shape[2]) if bounds is None else (bounds.shape[0] - 1, given.max_q)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], given.v.shape[-1]).transpose(1, 2)  # (B, H, N, Dv)
    lse_shape = (images, q.shape[1], longest) if given.return_lse else (0,)
    lse = q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return out, lse


@torch.library.custom_op("bsa_vision::attention_gradient", mutates_args=())
def gradient_op(
    grad_out: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    head_mask_type: Tensor | None,
    streaming_info: Tensor | None,
    base_blockmask: Tensor | None,
    carried: Tensor | None,
    seed: Tensor | None,
    handle: int,
    grid_h: int,
    grid_w: int,
    max_q: int,
    max_k: int,
    scale: float,
    is_causal: bool,
    exact_streaming: bool,
    dropout_p: float,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, rel_h, rel_w at `grad_out`; the last two are empty without relative position.

    By `gather`, whose gradient needs only the output, or by a backend for GPUs that brings its own, whose forward then runs again.
    """
    arguments = OpArgs(
        q,
        k,
        v,
        rel_h,
        rel_w,
        cu_seqlens_q,
        cu_seqlens_k,
        head_mask_type,
        streaming_info,
        base_blockmask,
        carried,
        seed,
        handle,
        grid_h,
        grid_w,
        max_q,
        max_k,
        scale,
        is_causal,
        exact_streaming,
        dropout_p,
        False,
        backend,
    )
    problem = _problem(arguments)
    own = _differentiated(problem, backend, grad_out) if not dropout_p else None
    if own is not None:
        dq, dk, dv, *rel = own
        dh, dw = rel or (q.new_empty(0), q.new_empty(0))
        return dq, dk, dv, dh, dw
    reason = gather.why_not(problem)
    if reason is None and dropout_p and choose(problem, backend) != "gather":
        reason = f"the dropout mask of {choose(problem, backend)!r} cannot be drawn again"
    if reason is not None:
        raise BackendUnavailable(
            f"this compiled call has no gradient: {reason}. Use backend='gather', or do not compile it."
        )
    with _without_autocast(q.device):
        gradients = _gradients(problem, out, grad_out)
    dq, dk, dv, dh, dw = (q.new_empty(0) if grad is None else grad for grad in gradients)
    return dq, dk, dv, dh, dw


@contextmanager
def _as_outside() -> Iterator[None]:
    """Inside of an operator: with autograd and vmap, which FlexAttention compiles with, as a caller has them."""
    autograd, vmap = ("AutogradFunctionality", "ADInplaceOrView"), ("FuncTorchBatched", "FuncTorchGradWrapper")
    layers = ("FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode")
    with ExitStack() as stack:
        for key in (*autograd, *vmap, *layers):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), False))
        yield


BRING_GRADIENTS = ("kernel", "cudnn", "flex")


def _differentiated(problem: Problem, backend: str, grad_out: Tensor) -> tuple[Tensor, ...] | None:
    """The gradients by the backend that would run this call where gradients are asked for; None where that is none of `BRING_GRADIENTS`."""
    with torch.enable_grad(), _as_outside():
        leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))]
        q, k, v, *terms = leaves
        asked = replace(problem, q=q, k=k, v=v, rel_pos=RelPos(*terms) if terms else None, return_lse=False)
        if backend != "auto" and why_not(backend, asked) is not None:
            backend = "auto"  # which ran forward and has no gradient for this call
        name = choose(asked, backend)
        if name not in BRING_GRADIENTS:
            return None
        return torch.autograd.grad(attend(asked, name).out, leaves, grad_out)


def _gradients(problem: Problem, out: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    if compiled.why_not(problem) is None:
        return gather.gradients(_with_order(problem), out, grad_out)
    layout, kv_layout = _layouts(problem)
    out, grad_out = (order_tokens(x, layout) for x in (out, grad_out))
    grads = gather.gradients(_ordered(problem), out, grad_out)
    layouts = (layout, kv_layout, kv_layout, layout, layout)
    return tuple(None if x is None else restore_tokens(x, to) for x, to in zip(grads, layouts, strict=True))


@gradient_op.register_fake
def _(grad_out: Tensor, out: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    given = OpArgs(*flat)
    inputs = (given.q, given.k, given.v, given.rel_h, given.rel_w)
    return tuple(given.q.new_empty(0 if like is None else like.shape) for like in inputs)


def _problem(given: OpArgs) -> Problem:
    q, k, v = given.q, given.k, given.v
    return Problem(
        q,
        k,
        v,
        _masks(given),
        given.scale,
        cu_seqlens_q=given.cu_seqlens_q,
        cu_seqlens_k=given.cu_seqlens_k,
        max_q=None if given.cu_seqlens_q is None else given.max_q,
        max_k=None if given.cu_seqlens_k is None else given.max_k,
        is_causal=given.is_causal,
        exact_streaming=given.exact_streaming,
        dropout_p=given.dropout_p,
        seed=0 if given.seed is None else int(given.seed),
        return_lse=given.return_lse,
        rel_pos=None if given.rel_h is None or given.rel_w is None else RelPos(given.rel_h, given.rel_w),
    )


def _masks(given: OpArgs) -> HeadMasks:
    grid, num_keys = (given.grid_h, given.grid_w), given.k.shape[2]
    if given.carried is not None:
        masks = read(given.carried).masks_for(grid, num_keys)
        if given.cu_seqlens_q is None:
            _check_carried(given, masks)
        return masks
    if given.handle:
        return from_handle(given.handle).masks_for(grid, num_keys)
    return HeadMasks(given.base_blockmask, given.head_mask_type, given.streaming_info, allow_empty_rows=True)


def _check_carried(given: OpArgs, masks: HeadMasks) -> None:
    """Raise ValueError where a saved program is run at another size than it carries masks for."""
    try:
        check_fit(given.q, given.k, masks, None)
    except ValueError as error:
        raise ValueError(
            f"this program carries the masks of one image size, and was given another: {error} Export it for this size."
        ) from None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = OpArgs(*inputs)
    ctx.save_for_backward(*given.tensors, output[0])
    ctx.numbers = given.numbers
    # The masks must live until backward. Under a compiler the handle may be symbolic; there the graph's owner keeps them.
    ctx.masks = from_handle(given.handle) if isinstance(given.handle, int) and given.handle else None


def _gradient(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out = ctx.saved_tensors
    given = OpArgs(*tensors, *ctx.numbers)
    dq, dk, dv, dh, dw = gradient_op(grad_out, out, *given)
    found = {"q": dq, "k": dk, "v": dv}
    if given.rel_h is not None:
        found |= {"rel_h": dh, "rel_w": dw}
    return tuple(found.get(name) for name in OpArgs._fields)


attention_op.register_autograd(_gradient, setup_context=_save)
gradient_op.register_autograd(lambda ctx, *_: refuse_second_derivative("gather"))

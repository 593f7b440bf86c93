"""Register block-sparse attention as a torch operator, and its gradient as another.

A compiler sees tensors and numbers (`Call`). The Python parts of a call (masks, cached block lists,
token order, choice of a backend) run inside the operator. Masks are passed as the handle of an
object, as the kernel's three tensors, or, in saved programs, as one tensor (`carried_masks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bsa_vision.attention.arguments import check_fit
from bsa_vision.attention.backends import gather
from bsa_vision.attention.backends.once import refuse_second_derivative
from bsa_vision.attention.backends.problem import Call, Problem, schema
from bsa_vision.attention.backends.select import choose, why_not
from bsa_vision.attention.carried_masks import read
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_source import from_handle
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.attention.token_order import attend, gradients
from bsa_vision.errors import BackendUnavailable

FORWARD = f"({schema()}) -> (Tensor, Tensor)"
BACKWARD = f"(Tensor grad_out, Tensor out, {schema()}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op("bsa_vision::attention", mutates_args=(), schema=FORWARD)
def attention_op(*flat: Any) -> tuple[Tensor, Tensor]:
    """Return out (B, H, N, Dv) of a `Call`, and lse (images, H, max_seqlen_q) or empty."""
    call = Call(*flat)
    problem = call.problem(_masks(call))
    backend = choose(problem, call.backend)
    with _as_outside() if backend == "flex" else nullcontext():
        out, lse, _ = attend(problem, backend)
    if lse is None or not call.return_lse:
        lse = out.new_empty(0, dtype=problem.compute_dtype)
    return out, lse


@attention_op.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    call = Call(*flat)
    q, bounds = call.q, call.cu_seqlens_q
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], call.v.shape[-1]).transpose(1, 2)
    shape: tuple[int, ...] = (0,)
    if call.return_lse and bounds is None:
        shape = (q.shape[0], q.shape[1], q.shape[2])
    elif call.return_lse and bounds is not None:
        shape = (bounds.shape[0] - 1, q.shape[1], call.max_seqlen_q)
    return out, q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("bsa_vision::attention_gradient", mutates_args=(), schema=BACKWARD)
def gradient_op(grad_out: Tensor, out: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, rel_h and rel_w; the last two are empty if not given.

    GPU backends in `OWN_GRADIENTS` run their forward again. All others use `gather`, whose gradient
    needs only the output.
    """
    call = Call(*flat)._replace(return_lse=False)
    problem = call.problem(_masks(call))
    found = None if call.dropout_p else _own_gradients(problem, call.backend, grad_out)
    if found is None:
        reason = gather.why_not(problem)
        if reason is None and call.dropout_p:
            backend = choose(problem, call.backend)
            if backend != "gather":
                reason = f"the dropout mask of {backend!r} cannot be reproduced"
        if reason is not None:
            raise BackendUnavailable(
                f"this compiled call has no gradient: {reason}. Use backend='gather', or run it "
                "without torch.compile."
            )
        found = gradients(problem, out, grad_out)
    dq, dk, dv, *terms = found
    dh, dw = terms or (out.new_empty(0), out.new_empty(0))
    return dq, dk, dv, dh, dw


@gradient_op.register_fake
def _(grad_out: Tensor, out: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    call = Call(*flat)
    inputs = (call.q, call.k, call.v, call.rel_h, call.rel_w)
    return tuple(call.q.new_empty(0 if x is None else x.shape) for x in inputs)


OWN_GRADIENTS = ("kernel", "cudnn", "flex")


def _own_gradients(problem: Problem, backend: str, grad_out: Tensor) -> tuple[Tensor, ...] | None:
    """Return the gradients from the backend of this call; None if not in `OWN_GRADIENTS`."""
    with torch.enable_grad(), _as_outside():
        tensors = (problem.q, problem.k, problem.v, *(problem.rel_pos or ()))
        leaves = [x.detach().requires_grad_() for x in tensors]
        q, k, v, *terms = leaves
        problem = replace(problem, q=q, k=k, v=v, rel_pos=RelPos(*terms) if terms else None)
        if backend != "auto" and why_not(backend, problem) is not None:
            backend = "auto"  # it ran the forward but has no gradient for this call
        name = choose(problem, backend)
        if name not in OWN_GRADIENTS:
            return None
        return torch.autograd.grad(attend(problem, name).out, leaves, grad_out)


@contextmanager
def _as_outside() -> Iterator[None]:
    """Restore the caller's autograd and vmap state inside an operator; FlexAttention needs it."""
    autograd = ("AutogradFunctionality", "ADInplaceOrView")
    vmap = ("FuncTorchBatched", "FuncTorchGradWrapper")
    layers = ("FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode")
    with ExitStack() as stack:
        for name in (*autograd, *vmap, *layers):
            key = getattr(torch._C.DispatchKey, name)
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def _masks(call: Call) -> HeadMasks:
    grid, num_keys = (call.grid_h, call.grid_w), call.k.shape[2]
    if call.carried is not None:
        masks: HeadMasks = read(call.carried).masks_for(grid, num_keys)
        if call.cu_seqlens_q is None:
            _check_carried(call, masks)
        return masks
    if call.handle:
        found: HeadMasks = from_handle(call.handle).masks_for(grid, num_keys)
        return found
    return HeadMasks(
        call.base_blockmask, call.head_mask_type, call.streaming_info, allow_empty_rows=True
    )


def _check_carried(call: Call, masks: HeadMasks) -> None:
    """Raise ValueError if the stored masks of a saved program are for another image size."""
    try:
        check_fit(call.q, call.k, masks, None)
    except ValueError as error:
        raise ValueError(
            f"this program contains masks for one image size only: {error} Export it for this size."
        ) from None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = Call(*inputs)
    ctx.save_for_backward(*call.tensors, output[0])
    ctx.numbers = call.numbers
    # Keep the masks until backward. If a compiler made the handle symbolic, the owner of the graph
    # keeps them.
    alive = isinstance(call.handle, int) and call.handle
    ctx.masks = from_handle(call.handle) if alive else None


def _gradient(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out = ctx.saved_tensors
    call = Call(*tensors, *ctx.numbers)
    dq, dk, dv, dh, dw = gradient_op(grad_out, out, *call)
    found = {"q": dq, "k": dk, "v": dv}
    if call.rel_h is not None:
        found |= {"rel_h": dh, "rel_w": dw}
    return tuple(found.get(name) for name in Call._fields)


attention_op.register_autograd(_gradient, setup_context=_save)
gradient_op.register_autograd(lambda ctx, *_: refuse_second_derivative("gather"))

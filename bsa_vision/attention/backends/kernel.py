"""MIT HAN Lab's CUDA kernel, from the package block_sparse_attn.

The package's public function sorts the mask in every call and again in the gradient, and waits for
the GPU to count heads. This backend calls its two operators with masks that are converted once for
each `HeadMasks`. The package is on no index, so it is looked up at run time.

Constraints (read from v0.0.2, see docs/backends.md): CUDA, compute capability 8.0 or newer, float16
or bfloat16, blocks of 128 tokens, head dims up to 128 (padded together to 32, 64 or 128). Relative
position becomes extra columns (`rel_pos_columns`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bsa_vision.attention.backends import rel_pos_columns
from bsa_vision.attention.backends.once import once
from bsa_vision.attention.backends.problem import Problem, Result
from bsa_vision.attention.block_lists import block_lists
from bsa_vision.errors import BackendUnavailable

BLOCK = 128
HEAD_DIMS = (32, 64, 128)
NO_WINDOW = (-1, -1)
OPERATORS = "_wrapped_block_sparse_attn_forward", "_wrapped_block_sparse_attn_backward"


@lru_cache(maxsize=1)
def _probe() -> ModuleType | str:
    """Return the package's module, or why it cannot be used.

    A broken installation must not break anything else, so every exception becomes a reason.
    """
    package = "the package block_sparse_attn"
    try:
        module = importlib.import_module("block_sparse_attn.block_sparse_attn_interface")
    except ModuleNotFoundError as error:
        if error.name in ("block_sparse_attn", "block_sparse_attn.block_sparse_attn_interface"):
            return f"{package} is not installed (build it from source)"
        return f"{package} cannot be imported: {error}"
    except Exception as error:
        return f"{package} is installed but broken: {type(error).__name__}: {error}"
    missing = [name for name in OPERATORS if not hasattr(module, name)]
    if missing:
        lacks = f"{package} at {module.__file__} has no {' and no '.join(missing)}"
        return f"{lacks}: it is not MIT HAN Lab's v0.0.2"
    return module


def why_not(problem: Problem) -> str | None:
    """Return why the kernel cannot run `problem`; None if it can."""
    q, v = problem.q, problem.v
    widest = max(q.shape[-1], v.shape[-1])
    if problem.not_on_nvidia:
        return f"the kernel runs on CUDA, {problem.not_on_nvidia}"
    if widest > HEAD_DIMS[-1]:
        # Upstream accepts up to 256, launches nothing above 128 and returns uninitialised memory.
        return f"head dim {widest} > 128: the kernel would return uninitialised memory"
    if problem.masks.block_size != BLOCK:
        return f"the kernel uses blocks of 128 tokens, the masks have {problem.masks.block_size}"
    if problem.exact_streaming and not problem.is_causal:
        return "exact streaming needs causal attention"
    if problem.exact_streaming and problem.needs_gradient:
        return "the kernel has no gradient for exact streaming"
    reason = rel_pos_columns.why_not(problem, HEAD_DIMS[-1])
    if reason is not None:
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 or bfloat16, got {q.dtype}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the kernel needs a GPU of compute capability 8.0 or newer"
    module = _probe()
    return module if isinstance(module, str) else None


def run(problem: Problem) -> Result:
    """Compute `problem`."""
    return rel_pos_columns.attend(problem, HEAD_DIMS[-1], _run)


def _run(problem: Problem) -> Result:
    dim, images = problem.v.shape[-1], problem.q.shape[0]
    padded = next(size for size in HEAD_DIMS if size >= max(dim, problem.q.shape[-1]))
    q, k, v = (
        F.pad(_packed(x), (0, padded - x.shape[-1])) for x in (problem.q, problem.k, problem.v)
    )
    masks = _converted(problem)
    cu_seqlens = (masks.cu_seqlens_q, masks.cu_seqlens_k)
    if problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None:
        cu_seqlens = (problem.cu_seqlens_q, problem.cu_seqlens_k)
    out, lse, probs = _Attend.apply(q, k, v, *cu_seqlens, masks, _Call.of(problem))
    out = rearrange(out[..., :dim], "(b n) h d -> b h n d", b=images)
    lse = lse[..., : problem.max_seqlen_q]
    if problem.cu_seqlens_q is not None:  # the kernel writes nothing past the end of an image
        position = torch.arange(problem.max_seqlen_q, device=lse.device)
        lse = lse.masked_fill(position >= problem.cu_seqlens_q.diff()[:, None, None], torch.inf)
    return Result(out, lse, probs)


def _packed(x: Tensor) -> Tensor:
    return rearrange(x, "b h n d -> (b n) h d").contiguous()


# Conversion of masks


@dataclass(frozen=True, eq=False)
class _Converted:
    """The masks as the kernel reads them, int32 on the device.

    types         (H,) 0 = dense, -1 = streaming, otherwise the head's slice, counted from 1; every
                  block-sparse head has one slice, in head order
    streaming     (2 * H,) [sink, local] of each head
    rows          (images, S, R, C) key blocks of each row, descending, then -1
    columns       (images, S, C, R) query blocks of each column likewise, for the gradient only
    cu_seqlens_*  (images + 1,) for images of one size
    """

    types: Tensor
    streaming: Tensor
    rows: Tensor | None
    columns: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor


def _converted(problem: Problem) -> _Converted:
    """Convert the masks, once per size.

    A ragged batch is converted in every call, because only the device knows its lengths.
    """
    gradient = problem.needs_gradient
    if problem.ragged:
        return _convert(problem, gradient)
    sizes = (problem.num_images, problem.max_seqlen_q, problem.max_seqlen_k)
    key = ("kernel", *sizes, problem.q.device, gradient)
    return problem.masks.remember(key, lambda: _convert(problem, gradient))


def _convert(problem: Problem, gradient: bool) -> _Converted:
    masks, images = problem.masks, problem.num_images

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=problem.q.device)

    # Expand to one slice per head: upstream ignores explicit slice numbers and gives the n-th head
    # of type 1 slice n.
    wanted = [kind - 1 for kind in masks.slices if kind > 0]
    numbers = iter(range(1, masks.num_heads + 1))
    types = [next(numbers) if kind > 0 else kind for kind in masks.slices]
    rows = columns = None
    if wanted:
        assert masks.base_blockmask is not None
        blocks = -(-problem.max_seqlen_q // BLOCK), -(-problem.max_seqlen_k // BLOCK)
        base = masks.base_blockmask.to(problem.q.device)[:, wanted, : blocks[0], : blocks[1]]
        if problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None:
            # The kernel reads only as many list entries as the image has blocks, so blocks past its
            # end must not be listed.
            base = base & _exist(problem.cu_seqlens_q, blocks[0])[:, None, :, None]
            base = base & _exist(problem.cu_seqlens_k, blocks[1])[:, None, None]
        rows = _last_first(base).expand(images, -1, -1, -1).contiguous()
        columns = _last_first(base.mT).expand(images, -1, -1, -1).contiguous() if gradient else None
    pairs = masks.streaming or [(0, 0)] * masks.num_heads
    cu_seqlens_q, cu_seqlens_k = (
        ints([image * tokens for image in range(images + 1)])
        for tokens in (problem.max_seqlen_q, problem.max_seqlen_k)
    )
    streaming = ints([number for pair in pairs for number in pair])
    return _Converted(ints(types), streaming, rows, columns, cu_seqlens_q, cu_seqlens_k)


def _exist(cu_seqlens: Tensor, blocks: int) -> Tensor:
    """(images, blocks) bool: blocks that start before the end of their image."""
    return torch.arange(blocks, device=cu_seqlens.device) * BLOCK < cu_seqlens.diff()[:, None]


def _last_first(mask: Tensor) -> Tensor:
    """List the kept columns of each row of an (..., R, C) bool mask, descending, then -1: int32."""
    counts, kept_last = block_lists(mask.flip(-1))
    listed = torch.arange(mask.shape[-1], device=mask.device) < counts[..., None]
    return torch.where(listed, mask.shape[-1] - 1 - kept_last, -1)


# The package's operators


@dataclass(frozen=True)
class _Call:
    """Options of one call of the operators."""

    max_seqlens: tuple[int, int]
    dropout_p: float
    scale: float
    is_causal: bool
    exact_streaming: bool
    deterministic: bool
    return_probs: bool

    @classmethod
    def of(cls, problem: Problem) -> _Call:
        return cls(
            (problem.max_seqlen_q, problem.max_seqlen_k),
            problem.dropout_p,
            problem.scale,
            problem.is_causal,
            problem.exact_streaming,
            problem.deterministic,
            problem.return_probs and problem.dropout_p > 0,
        )


class _Attend(torch.autograd.Function):
    """Make the package's two operators differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        masks: _Converted,
        call: _Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, probs, random_state = getattr(_probe(), OPERATORS[0])(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            BLOCK,
            BLOCK,
            masks.types,
            masks.streaming,
            masks.rows,
            *call.max_seqlens,
            call.dropout_p,
            call.scale,
            call.is_causal,
            call.exact_streaming,
            call.return_probs,
            *NO_WINDOW,
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, random_state)
        ctx.masks, ctx.call = masks, call
        ctx.mark_non_differentiable(lse, probs)
        return out, lse, probs

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, random_state = ctx.saved_tensors
        masks, call = ctx.masks, ctx.call
        if call.exact_streaming:
            raise BackendUnavailable(
                "the kernel has no gradient for exact streaming: use backend='reference', or "
                "block streaming."
            )
        grads = [torch.empty_like(x) for x in (q, k, v)]
        getattr(_probe(), OPERATORS[1])(
            grad_out.contiguous(),
            q,
            k,
            v,
            out,
            lse,
            *grads,
            cu_seqlens_q,
            cu_seqlens_k,
            BLOCK,
            BLOCK,
            masks.types,
            masks.streaming,
            masks.columns,
            *call.max_seqlens,
            call.dropout_p,
            call.scale,
            True,  # initialise the gradients with zero
            call.is_causal,
            *NO_WINDOW,
            call.deterministic,
            random_state,
        )
        return (*once("kernel", grad_out, q, tuple(grads)), None, None, None, None)

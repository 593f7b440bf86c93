"""NVIDIA's block-sparse attention kernels, from the package nvidia-cudnn-frontend: our block lists as they are.

Read from 1.32.0 (`cudnn/block_sparse_attention`, Apache-2.0), whose checks and compiler take these calls; not yet run by us. CUDA, compute
capability 9.0 to 12.x, float16 or bfloat16, blocks of 128 tokens, no bias, not causal; q and k padded to 64, 96 or 128, and v for itself (on 9.x;
to 128 on 12.x). Relative position by `concat`.
Nothing is sorted or synchronised in a call: lists are made once for each `HeadMasks`. The kernels' gradient serves bfloat16, one key head
for each query head and one width; calls that need another go elsewhere. It is not deterministic. Kernels are compiled at their first call.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_vision.attention.backends import rel_pos_columns
from bsa_vision.attention.backends.once import once
from bsa_vision.attention.backends.problem import Problem, Result
from bsa_vision.attention.block_lists import block_lists

BLOCK = 128
WIDTHS = (64, 96, 128)  # of q and k, and of v
MOST_HEADS = 65535  # images x heads: the launch grid's limit, which the package does not check


def why_not(problem: Problem) -> str | None:
    q, v = problem.q, problem.v
    if problem.not_on_nvidia:
        return f"cuDNN's kernels run on CUDA, {problem.not_on_nvidia}"
    if problem.masks.block_size != BLOCK:
        return (
            f"cuDNN's kernels have blocks of 128 tokens, the masks have {problem.masks.block_size}"
        )
    if problem.ragged:
        return "cuDNN's kernels take images of one size"
    if problem.is_causal or problem.exact_streaming:
        return "cuDNN's kernels are not causal"
    if problem.dropout_p or problem.return_probs:
        return "cuDNN's kernels have no dropout"
    if max(q.shape[-1], v.shape[-1]) > WIDTHS[-1]:
        return (
            f"cuDNN's kernels are at most 128 wide, got head dims {q.shape[-1]} and {v.shape[-1]}"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"cuDNN's kernels take float16 or bfloat16, got {q.dtype}"
    if 0 in (*q.shape, *problem.k.shape):
        return "there are no tokens"
    if q.shape[0] * q.shape[1] > MOST_HEADS:
        return f"cuDNN's kernels take {MOST_HEADS} heads of all images together, got {q.shape[0] * q.shape[1]}"
    reason = rel_pos_columns.why_not(problem, WIDTHS[-1])
    if reason is not None:
        return reason
    major = torch.cuda.get_device_capability(q.device)[0]
    if not 9 <= major <= 12:
        return f"cuDNN's block-sparse kernels need a GPU of compute capability 9.0 to 12.x, this one has {major}.x"
    if problem.needs_gradient:
        reason = _why_no_gradient(problem)
        if reason is not None:
            return reason
    module = _probe()
    return module if isinstance(module, str) else None


def _why_no_gradient(problem: Problem) -> str | None:
    capability = torch.cuda.get_device_capability(problem.q.device)
    if capability[0] != 9 and capability not in ((10, 0), (10, 3)):
        return f"cuDNN's gradient needs a GPU of compute capability 9.x, 10.0 or 10.3, this one has {capability[0]}.{capability[1]}"
    if problem.q.dtype != torch.bfloat16:
        return f"cuDNN's gradient takes bfloat16, got {problem.q.dtype}"
    if problem.group > 1:
        return "cuDNN's gradient needs as many key heads as query heads"
    return None


@lru_cache(maxsize=1)
def _probe() -> ModuleType | str:
    """The package, or why it cannot be imported. The kernels' own module is imported, too: the package itself does so in its first call only."""
    try:
        module = importlib.import_module("cudnn.block_sparse_attention")
        importlib.import_module("cudnn.block_sparse_attention._interface")
        _functions(module)
    except ModuleNotFoundError as error:
        if error.name in ("cudnn", "cudnn.block_sparse_attention"):
            return "the package nvidia-cudnn-frontend is not installed, or older than 1.32 (pip install 'bsa-vision[cuda]')"
        return f"the package nvidia-cudnn-frontend cannot be imported: {error}"
    except Exception as error:
        return f"the package nvidia-cudnn-frontend is installed but broken: {type(error).__name__}: {error}"
    return module


def _functions(module: Any) -> tuple[Any, Any]:
    return module.block_sparse_attention_forward, module.block_sparse_attention_backward


def run(problem: Problem) -> Result:
    return rel_pos_columns.attend(problem, WIDTHS[-1], _run)


def _run(problem: Problem) -> Result:
    q, k, v = problem.q, problem.k, problem.v
    width, width_v = (next(width for width in WIDTHS if width >= x.shape[-1]) for x in (q, v))
    # Kernels for newer GPUs have one width, which on 12.x is 128; so has every gradient, which for 9.x is 128.
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9
    if major == 12:
        width = width_v = WIDTHS[-1]
    elif problem.needs_gradient:
        width = width_v = WIDTHS[-1] if major == 9 or max(width, width_v) > 64 else 64
    elif major > 9:
        width = width_v = max(width, width_v)
    start = 128 if major == 12 else 16
    q, k, v = _padded(q, width, start), _padded(k, width, start), _padded(v, width_v, start)
    out, lse = _Attend.apply(q, k, v, _lists(problem), problem.scale)
    nothing = lse.isneginf()  # a query sees nothing: said as the other kernel says it
    out = out[..., : problem.v.shape[-1]].masked_fill(nothing[..., None], 0)
    return Result(out, lse.masked_fill(nothing, torch.inf))


def _padded(x: Tensor, width: int, start: int) -> Tensor:
    """As wide, beginning at a multiple of `start` bytes, rows at multiples of 16, as the kernels read them."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    aligned = (
        x.data_ptr() % start == 0
        and x.stride(-1) == 1
        and all(step % 8 == 0 for step in x.stride()[:-1])
    )
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, eq=False)
class _Lists:
    """int32 on the device: (B, H, R, C) key blocks of each row, (B, H, R) how many, (C,) tokens in each key block; whether a row may keep none."""

    index: Tensor
    counts: Tensor
    sizes: Tensor
    some_are_empty: bool


def _lists(problem: Problem) -> _Lists:
    tokens, device = (problem.q.shape[2], problem.k.shape[2]), problem.q.device

    def make() -> _Lists:
        mask = problem.masks.block_mask(*tokens)
        some_are_empty = not bool(mask.any(-1).all())
        mask = mask.to(device)
        # The whole width even where rows keep less: another width would compile the gradient anew.
        counts, index = (
            x.expand(problem.q.shape[0], *x.shape[1:]).contiguous() for x in block_lists(mask)
        )
        # Given even where all blocks are full: some kernels do not mask the end of the sequence themselves.
        sizes = torch.full((index.shape[-1],), BLOCK, dtype=torch.int32, device="cpu")
        sizes[-1] = tokens[1] - BLOCK * (len(sizes) - 1)
        return _Lists(index, counts, sizes.to(device), some_are_empty)

    return problem.masks.remember(("cudnn", problem.q.shape[0], *tokens, device), make)


class _Attend(torch.autograd.Function):
    """The package's two functions as one that torch differentiates; the log-sum-exp has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: _Lists, scale: float
    ) -> tuple[Tensor, Tensor]:
        forward, _ = _functions(_probe())
        out, lse = forward(
            *(x.detach() for x in (q, k, v)),
            lists.index,
            q2k_block_nums=lists.counts,
            block_sizes=lists.sizes,
            sparse_block_size=BLOCK,
            allow_empty_block_nums=lists.some_are_empty,
            softmax_scale=scale,
            pack_gqa=False,  # packed, lists would be of another shape
            layout="bhsd",
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lists, ctx.scale = lists, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        _, backward = _functions(_probe())
        dq, dk, dv = backward(
            grad_out.contiguous(),
            q.detach(),
            k.detach(),
            v.detach(),
            out,
            lse,
            ctx.lists.index,
            q2k_block_nums=ctx.lists.counts,
            block_sizes=ctx.lists.sizes,
            sparse_block_size=BLOCK,
            softmax_scale=ctx.scale,
            layout="bhsd",
        )
        return (*once("cudnn", grad_out, q, (dq, dk, dv)), None, None)

"""NVIDIA's block-sparse attention kernels from the package nvidia-cudnn-frontend.

Written for version 1.32.0 (`cudnn/block_sparse_attention`, Apache-2.0). Its argument checks and its
compiler accept these calls; they have not been run on a GPU yet. Kernels are compiled at their
first call. Block lists are built once for each `HeadMasks`, so a call neither sorts nor
synchronises.

Constraints: CUDA, compute capability 9.0 to 12.x, float16 or bfloat16, blocks of 128 tokens, no
bias, not causal. Head dims are padded to 64, 96 or 128: on 9.x v separately from q and k, on 12.x
all to 128. Relative position becomes extra columns (`rel_pos_columns`). The gradient needs
bfloat16, one key head per query head and equal head dims, and is not deterministic.
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
WIDTHS = (64, 96, 128)  # padded head dims
MOST_HEADS = 65535  # images x heads; limit of the launch grid, which the package does not check


def why_not(problem: Problem) -> str | None:
    """Return why cuDNN cannot run `problem`; None if it can."""
    q, v = problem.q, problem.v
    size, heads = problem.masks.block_size, q.shape[0] * q.shape[1]
    if problem.not_on_nvidia:
        return f"cuDNN's kernels run on CUDA, {problem.not_on_nvidia}"
    if size != BLOCK:
        return f"cuDNN's kernels use blocks of 128 tokens, the masks have {size}"
    if problem.ragged:
        return "cuDNN's kernels need images of one size"
    if problem.is_causal or problem.exact_streaming:
        return "cuDNN's kernels are not causal"
    if problem.dropout_p or problem.return_probs:
        return "cuDNN's kernels have no dropout"
    if max(q.shape[-1], v.shape[-1]) > WIDTHS[-1]:
        return f"cuDNN's kernels take head dims up to 128, got {q.shape[-1]} and {v.shape[-1]}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"cuDNN's kernels take float16 or bfloat16, got {q.dtype}"
    if 0 in (*q.shape, *problem.k.shape):
        return "there are no tokens"
    if heads > MOST_HEADS:
        return f"cuDNN's kernels take up to {MOST_HEADS} heads over all images, got {heads}"
    reason = rel_pos_columns.why_not(problem, WIDTHS[-1])
    if reason is not None:
        return reason
    major = torch.cuda.get_device_capability(q.device)[0]
    if not 9 <= major <= 12:
        return f"cuDNN's kernels need compute capability 9.0 to 12.x, this GPU has {major}.x"
    if problem.needs_gradient:
        reason = _why_no_gradient(problem)
        if reason is not None:
            return reason
    module = _probe()
    return module if isinstance(module, str) else None


def _why_no_gradient(problem: Problem) -> str | None:
    major, minor = torch.cuda.get_device_capability(problem.q.device)
    if major != 9 and (major, minor) not in ((10, 0), (10, 3)):
        needed = "cuDNN's gradient needs compute capability 9.x, 10.0 or 10.3"
        return f"{needed}, this GPU has {major}.{minor}"
    if problem.q.dtype != torch.bfloat16:
        return f"cuDNN's gradient takes bfloat16, got {problem.q.dtype}"
    if problem.group > 1:
        return "cuDNN's gradient needs as many key heads as query heads"
    return None


@lru_cache(maxsize=1)
def _probe() -> ModuleType | str:
    """Return the package's module, or why it cannot be imported.

    Also imports the module of the kernels, which the package itself imports at its first call.
    """
    package = "the package nvidia-cudnn-frontend"
    try:
        module = importlib.import_module("cudnn.block_sparse_attention")
        importlib.import_module("cudnn.block_sparse_attention._interface")
        _functions(module)
    except ModuleNotFoundError as error:
        if error.name in ("cudnn", "cudnn.block_sparse_attention"):
            advice = "pip install 'bsa-vision[cuda]'"
            return f"{package} is not installed, or older than 1.32 ({advice})"
        return f"{package} cannot be imported: {error}"
    except Exception as error:
        return f"{package} is installed but broken: {type(error).__name__}: {error}"
    return module


def _functions(module: Any) -> tuple[Any, Any]:
    return module.block_sparse_attention_forward, module.block_sparse_attention_backward


def run(problem: Problem) -> Result:
    """Compute `problem`."""
    return rel_pos_columns.attend(problem, WIDTHS[-1], _run)


def _run(problem: Problem) -> Result:
    q, k, v = problem.q, problem.k, problem.v
    width, width_v = (next(width for width in WIDTHS if width >= x.shape[-1]) for x in (q, v))
    # All tensors must have the same width on GPUs newer than 9.x (128 on 12.x), and for gradients
    # (128 on 9.x).
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9
    if major == 12:
        width = width_v = WIDTHS[-1]
    elif problem.needs_gradient:
        width = width_v = WIDTHS[-1] if major == 9 or max(width, width_v) > 64 else 64
    elif major > 9:
        width = width_v = max(width, width_v)
    alignment = 128 if major == 12 else 16
    q, k = _padded(q, width, alignment), _padded(k, width, alignment)
    v = _padded(v, width_v, alignment)
    out, lse = _Attend.apply(q, k, v, _lists(problem), problem.scale)
    empty = lse.isneginf()  # queries without keys: +inf, as the other backends return
    out = out[..., : problem.v.shape[-1]].masked_fill(empty[..., None], 0)
    return Result(out, lse.masked_fill(empty, torch.inf))


def _padded(x: Tensor, width: int, alignment: int) -> Tensor:
    """Pad the head dim to `width` and align the memory as the kernels need it.

    The data must start at a multiple of `alignment` bytes, and rows at multiples of 16.
    """
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    aligned = (
        x.data_ptr() % alignment == 0
        and x.stride(-1) == 1
        and all(step % 8 == 0 for step in x.stride()[:-1])
    )
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, eq=False)
class _Lists:
    """Block lists, int32 on the device."""

    index: Tensor  # (B, H, R, C) key blocks of each row, kept ones first
    counts: Tensor  # (B, H, R) kept key blocks per row
    sizes: Tensor  # (C,) tokens in each key block
    some_are_empty: bool  # whether some row keeps no block


def _lists(problem: Problem) -> _Lists:
    images, device = problem.q.shape[0], problem.q.device
    tokens = (problem.q.shape[2], problem.k.shape[2])

    def make() -> _Lists:
        mask = problem.masks.block_mask(*tokens)
        some_are_empty = not bool(mask.any(-1).all())
        mask = mask.to(device)
        # Full width, even if rows keep fewer blocks: another width would recompile the gradient.
        counts, index = (x.expand(images, *x.shape[1:]).contiguous() for x in block_lists(mask))
        # Passed even if all blocks are full: some kernels do not mask the end of the sequence.
        sizes = torch.full((index.shape[-1],), BLOCK, dtype=torch.int32, device="cpu")
        sizes[-1] = tokens[1] - BLOCK * (len(sizes) - 1)
        return _Lists(index, counts, sizes.to(device), some_are_empty)

    return problem.masks.remember(("cudnn", images, *tokens, device), make)


class _Attend(torch.autograd.Function):
    """Make the package's two functions differentiable; the log-sum-exp has no gradient."""

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
            pack_gqa=False,  # packing needs lists of another shape
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

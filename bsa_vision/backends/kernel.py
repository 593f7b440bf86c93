"""mit-han-lab's CUDA kernel, `block_sparse_attn`: our problems in its terms, its limits as sentences.

Constraints (read from v0.0.2, see docs/backends.md): CUDA, compute capability >= 8.0, float16 or bfloat16, blocks of 128,
head dim up to 128 (padded here to 32, 64 or 128), v as wide as q, no relative position.
The package is on no index: it is looked for at run time.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bsa_vision.backends.problem import Problem, Result

BLOCK = 128
HEAD_DIMS = (32, 64, 128)


@lru_cache(maxsize=1)
def _probe() -> ModuleType | str:
    """The package, or why it cannot be imported; a broken install must break nothing else."""
    try:
        module = importlib.import_module("block_sparse_attn")
    except ModuleNotFoundError as error:
        if error.name == "block_sparse_attn":
            return "the package block_sparse_attn is not installed (build it from its own source)"
        return f"the package block_sparse_attn cannot be imported: {error}"
    except Exception as error:
        return f"the package block_sparse_attn is installed but broken: {type(error).__name__}: {error}"
    if not hasattr(module, "block_sparse_attn_func"):
        return f"the package block_sparse_attn at {module.__file__} has no block_sparse_attn_func"
    return module


def why_not(problem: Problem) -> str | None:
    q, v = problem.q, problem.v
    if q.shape[-1] > HEAD_DIMS[-1]:
        # Upstream accepts up to 256, launches nothing above 128 and returns uninitialised memory.
        return f"head dim {q.shape[-1]} > 128: the kernel would return uninitialised memory"
    if v.shape[-1] != q.shape[-1]:
        return f"the kernel needs v as wide as q, got head dims {v.shape[-1]} and {q.shape[-1]}"
    if problem.masks.block_size != BLOCK:
        return f"the kernel has blocks of 128 tokens, the masks have {problem.masks.block_size}"
    if problem.rel_pos is not None:
        return "the kernel takes no bias, so no relative position"
    if problem.exact_streaming and not problem.is_causal:
        return "exact streaming is causal only"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 or bfloat16, got {q.dtype}"
    if q.device.type != "cuda":
        return f"the kernel runs on CUDA, the tensors are on {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the kernel needs a GPU of compute capability 8.0 or newer"
    module = _probe()
    return module if isinstance(module, str) else None


def run(problem: Problem) -> Result:
    module = _probe()
    assert isinstance(module, ModuleType), module
    q, k, v = (_packed(x) for x in (problem.q, problem.k, problem.v))
    dim = q.shape[-1]
    padded = next(size for size in HEAD_DIMS if size >= dim)
    q, k, v = (F.pad(x, (0, padded - dim)) for x in (q, k, v))
    out, lse, probs = module.block_sparse_attn_func(
        q,
        k,
        v,
        _cu_seqlens(problem.cu_seqlens_q, problem.q),
        _cu_seqlens(problem.cu_seqlens_k, problem.k),
        _ints([min(kind, 1) for kind in problem.masks.slices], q),
        _ints([number for pair in problem.masks.streaming for number in pair], q) if problem.masks.streaming else None,
        _one_slice_per_head(problem),
        problem.longest_q,
        problem.longest_k,
        problem.dropout_p,
        deterministic=problem.deterministic,
        softmax_scale=problem.scale,
        is_causal=problem.is_causal,
        exact_streaming=problem.exact_streaming,
        return_attn_probs=True,
    )
    out = rearrange(out[..., :dim], "(b n) h d -> b h n d", b=problem.q.shape[0])
    return Result(out, lse[..., : problem.longest_q], probs)


def _packed(x: Tensor) -> Tensor:
    return rearrange(x, "b h n d -> (b n) h d").contiguous()


def _cu_seqlens(given: Tensor | None, x: Tensor) -> Tensor:
    if given is not None:
        return given
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[2]


def _ints(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def _one_slice_per_head(problem: Problem) -> Tensor | None:
    """Explicit slice numbers expanded: upstream counts the ones and gives each the next slice, whatever was meant."""
    masks = problem.masks
    wanted = [kind - 1 for kind in masks.slices if kind > 0]
    if not wanted:
        return None
    assert masks.base_blockmask is not None
    rows, columns = -(-problem.longest_q // BLOCK), -(-problem.longest_k // BLOCK)
    base = masks.base_blockmask.to(problem.q.device)[:, wanted, :rows, :columns]
    return base.expand(problem.num_images, -1, -1, -1).contiguous()

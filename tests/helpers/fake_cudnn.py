"""Stand-in for `cudnn.block_sparse_attention` on the CPU.

It follows the source of nvidia-cudnn-frontend 1.32.0 for compute capability 9.0, with the same
checks and omissions: the default scale comes from the padded head dim, list entries past a row's
count are never read, the log-sum-exp of queries without keys is -inf, and there is no autograd.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor

WIDTHS = (64, 96, 128)


def block_sparse_attention_forward(
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    q2k_block_index: Tensor,
    block_sparse_num: int | None = None,
    block_sizes: Tensor | None = None,
    q2k_block_nums: Tensor | None = None,
    *,
    sparse_block_size: int | None = None,
    allow_empty_block_nums: bool = False,
    softmax_scale: float | None = None,
    pack_gqa: bool | None = None,
    layout: str = "bhsd",
    kv_splits: int = 1,
    use_clc: bool | None = None,
) -> dict[str, Tensor]:
    tensors = (q_tensor, k_tensor, v_tensor)
    _check(*tensors, q2k_block_index, q2k_block_nums, block_sizes, sparse_block_size, layout)
    if pack_gqa is not False and q_tensor.shape[1] > k_tensor.shape[1]:
        raise ValueError("packed grouped queries need lists per key head, as on 10.x")
    if not allow_empty_block_nums:
        assert (q2k_block_nums > 0).all(), "garbage on 10.x"
    assert not any(x.requires_grad for x in tensors)
    out, lse = _attend(*tensors, q2k_block_index, q2k_block_nums, block_sizes, softmax_scale)
    return TupleDict(o_tensor=out.to(q_tensor.dtype).contiguous(), lse_tensor=lse.float())


def block_sparse_attention_backward(
    do_tensor: Tensor,
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    o_tensor: Tensor,
    lse_tensor: Tensor,
    q2k_block_index: Tensor,
    block_sparse_num: int | None = None,
    block_sizes: Tensor | None = None,
    q2k_block_nums: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    sparse_block_size: int | None = None,
    layout: str = "bhsd",
) -> dict[str, Tensor]:
    tensors = (q_tensor, k_tensor, v_tensor)
    _check(*tensors, q2k_block_index, q2k_block_nums, block_sizes, sparse_block_size, layout)
    if q_tensor.dtype != torch.bfloat16 or q_tensor.shape[1] != k_tensor.shape[1]:
        raise NotImplementedError("bf16 and MHA only")
    if {x.shape[-1] for x in tensors} != {128}:
        raise NotImplementedError("head dim 128 only")
    assert lse_tensor.shape == q_tensor.shape[:3]
    assert lse_tensor.dtype == torch.float32
    assert do_tensor.shape == o_tensor.shape
    assert do_tensor.dtype == o_tensor.dtype == q_tensor.dtype
    with torch.enable_grad():
        leaves = [x.detach().double().requires_grad_() for x in tensors]
        out, _ = _attend(*leaves, q2k_block_index, q2k_block_nums, block_sizes, softmax_scale)
        grads = torch.autograd.grad(out, leaves, do_tensor.double())
    names = ("dq_tensor", "dk_tensor", "dv_tensor")
    return TupleDict(zip(names, (x.to(q_tensor.dtype) for x in grads)))


class TupleDict(dict):
    """A dict that unpacks to its values, as the package returns it."""

    def __iter__(self):
        return iter(self.values())


def _check(q, k, v, index, nums, sizes, block, layout):
    if layout != "bhsd" or block != 128:  # 64 is the default on 9.0
        raise NotImplementedError("the stand-in supports bhsd and blocks of 128")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError("dimensions")
    if q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
        raise ValueError("shapes")
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError("dtypes")
    if q.shape[-1] not in WIDTHS or v.shape[-1] not in WIDTHS:
        raise NotImplementedError(f"widths {q.shape[-1]} and {v.shape[-1]}")
    for x in (q, k, v):
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(step % 8 for step in x.stride()[:-1]):
            raise NotImplementedError("rows must be 16-byte aligned")
    rows, columns = (-(-x.shape[2] // 128) for x in (q, k))
    for x, shape in (
        (index, (*q.shape[:2], rows, index.shape[-1])),
        (nums, (*q.shape[:2], rows)),
        (sizes, (columns,)),
    ):
        if x.dtype != torch.int32 or x.shape != shape:
            raise ValueError(f"metadata of {x.dtype} {tuple(x.shape)}")


def _attend(q, k, v, index, nums, sizes, scale):
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    listed = torch.arange(index.shape[-1]) < nums[..., None]
    index = torch.where(listed, index, -1).long()
    one_hot = torch.nn.functional.one_hot(index + 1, len(sizes) + 1)[..., 1:]
    mask = one_hot.sum(-2).bool()  # (B, H, R, C)
    mask = mask.repeat_interleave(128, 2)[:, :, : q.shape[2]]
    mask = mask.repeat_interleave(128, 3)[..., : k.shape[2]]
    position = torch.arange(k.shape[2])
    mask = mask & (position % 128 < sizes[position // 128])
    logits = (scale * q @ k.mT).masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    probs = (logits - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()
    return probs @ v, lse


def make_modules() -> dict[str, types.ModuleType]:
    """Return the stand-in modules by import name."""
    names = ("cudnn", "cudnn.block_sparse_attention", "cudnn.block_sparse_attention._interface")
    modules = {name: types.ModuleType(name) for name in names}
    for module in modules.values():
        module.__path__ = []
    public = modules["cudnn.block_sparse_attention"]
    public.block_sparse_attention_forward = block_sparse_attention_forward
    public.block_sparse_attention_backward = block_sparse_attention_backward
    return modules

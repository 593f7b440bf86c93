"""The implementations that `bsa-vision bench` compares.

All get the same numbers and masks. bsa-vision takes tokens in model order, so its time includes
ordering them. The other implementations do not order tokens and get q, k, v in packed order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsa_vision.attention.backends import cpu_kernel
from bsa_vision.attention.backends.select import choose
from bsa_vision.attention.functional import sparse_attention
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.bench.case import Inputs
from bsa_vision.errors import BackendUnavailable
from bsa_vision.storage.machine import free_memory

# Share of the free memory that N x N tensors may take. The estimates are rough, and a process that
# is killed for memory reports nothing.
MEMORY_SHARE = 0.6


@dataclass(frozen=True, eq=False)
class Prepared:
    """An implementation that is ready to run one case.

    run      returns (out,), or with backward (out, dq, dk, dv), followed by (drel_h, drel_w) with
             relative position, all in the token order of `inputs`
    backend  the chosen backend, "" if the implementation has only one
    """

    inputs: Inputs
    run: Callable[[], tuple[Tensor, ...]]
    backend: str = ""

    def packed_results(self) -> tuple[Tensor, ...]:
        """Run once and return the results in packed order."""
        return self.inputs.pack(self.run())


class Implementation(NamedTuple):
    """One implementation.

    prepare   not timed; raises BackendUnavailable if the implementation cannot run the case
    is_dense  ignores masks and relative position
    """

    title: str
    prepare: Callable[[Inputs], Prepared]
    is_dense: bool = False


def _prepared(
    inputs: Inputs, forward: Callable[..., Tensor], biased: bool = False, backend: str = ""
) -> Prepared:
    """Wrap `forward(q, k, v, *rel_pos)`, with gradients if asked for; `biased` has rel_pos."""
    tensors = inputs.tensors if biased else inputs.tensors[:3]

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        return (forward(*tensors),)

    def run_backward() -> tuple[Tensor, ...]:
        out = forward(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad))

    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    return Prepared(inputs, run if inputs.grad is None else run_backward, backend)


def _bsa(inputs: Inputs) -> Prepared:
    masks, backend, problem = inputs.masks, inputs.case.backend, inputs.problem(inputs.tensors)
    name = choose(problem, backend)
    name = f"gather, {cpu_kernel.flavour(problem)}" if name == "gather" else name

    def forward(q: Tensor, k: Tensor, v: Tensor, *terms: Tensor) -> Tensor:
        rel_pos = RelPos(*terms) if terms else None
        out = sparse_attention(q, k, v, masks, rel_pos=rel_pos, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return _prepared(inputs, forward, True, name)


# torch's attention: dense, and with the mask per token


def _sdpa(inputs: Inputs) -> Prepared:
    return _prepared(inputs, F.scaled_dot_product_attention)


def _sdpa_mask(inputs: Inputs) -> Prepared:
    _check_unbiased(inputs)
    blocks = _blocks(inputs)
    if bool((blocks == blocks[:, :1]).all()):  # equal masks are passed once, as a user would do
        blocks = blocks[:, :1]
    # The bool mask, and the float mask that torch builds from it in every call.
    _check_memory(inputs, blocks.shape[1] * (1 + inputs.q.itemsize))
    index = inputs.case.layout.block_of.to(blocks.device)
    mask = blocks.index_select(2, index).index_select(3, index)  # (1, H or 1, N, N)
    return _prepared(inputs.packed, partial(F.scaled_dot_product_attention, attn_mask=mask))


def _blocks(inputs: Inputs) -> Tensor:
    """(1, H, R, C) bool on the device of the inputs."""
    tokens = inputs.case.tokens
    return inputs.masks.block_mask(tokens, tokens).to(inputs.q.device)


def _check_unbiased(inputs: Inputs) -> None:
    if inputs.case.rel_pos:
        raise BackendUnavailable("it does not support relative position")


def _check_memory(inputs: Inputs, bytes_each: int) -> None:
    needed = bytes_each * inputs.case.tokens**2 * (2 if inputs.case.backward else 1)
    free = free_memory(inputs.case.device)
    if needed > MEMORY_SHARE * free:
        sizes = f"{needed / 1e9:.1f} GB for {inputs.case.tokens:,} tokens, {free / 1e9:.1f} GB"
        raise BackendUnavailable(f"the N x N mask would need {sizes} are free")


# FlexAttention, compiled


def _flex(inputs: Inputs) -> Prepared:
    if inputs.case.backward and inputs.case.device == "cpu":
        raise BackendUnavailable("FlexAttention has no backward on the CPU")
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    # Beyond torch's limit on graphs per function, FlexAttention would run uncompiled.
    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    count, index = _lists(inputs)
    lists = (torch.zeros_like(count), torch.zeros_like(index), count, index)  # all blocks are full
    size, tokens = inputs.case.block_size, inputs.case.tokens
    block_mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, seq_lengths=(tokens, tokens))
    row, column = (x.to(inputs.q.device) for x in inputs.case.layout.coordinates)

    def forward(q: Tensor, k: Tensor, v: Tensor, *terms: Tensor) -> Tensor:
        def add_rel_pos(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + terms[0][b, h, i, row[j]] + terms[1][b, h, i, column[j]]

        modify = add_rel_pos if terms else None
        out: Tensor = compiled(q, k, v, score_mod=modify, block_mask=block_mask)
        return out

    return _prepared(inputs.packed, forward, biased=True)


def _lists(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return int32 counts of kept blocks, (1, H, R), and columns, kept first, (1, H, R, C)."""
    blocks = _blocks(inputs)
    index = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32), index


# GPUs only: single kernels of torch, and block-sparse kernels called directly


def _check_gpu(inputs: Inputs) -> None:
    if not inputs.q.is_cuda:
        raise BackendUnavailable("it needs a CUDA device")


def _sdpa_kernel(kind: SDPBackend, inputs: Inputs) -> Prepared:
    _check_gpu(inputs)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    return _prepared(inputs, forward)


def _import(package: str, name: str, inputs: Inputs) -> Any:
    _check_gpu(inputs)
    _check_unbiased(inputs)
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise BackendUnavailable(f"{package} cannot be imported: {error}") from None


def _kernel(inputs: Inputs) -> Prepared:
    function = _import("block_sparse_attn", "block_sparse_attn_func", inputs)
    case, device = inputs.case, inputs.q.device
    base = _blocks(inputs).expand(case.batch, -1, -1, -1).contiguous()
    cu_seqlens = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.tokens
    types = torch.ones(case.heads, dtype=torch.int32, device=device)
    max_seqlens = (case.tokens, case.tokens)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        ragged = (cu_seqlens, cu_seqlens, types, None, base, *max_seqlens)
        out: Tensor = function(*tokens, *ragged, 0.0)
        return out.unflatten(0, (case.batch, -1)).transpose(1, 2)

    return _prepared(inputs.packed, forward)


def _cudnn(inputs: Inputs) -> Prepared:
    package = "cudnn.block_sparse_attention"
    function, case = _import(package, "block_sparse_attention_forward", inputs), inputs.case
    if case.backward:
        raise BackendUnavailable("its backward is not benchmarked")
    count, index = (x.expand(case.batch, *x.shape[1:]).contiguous() for x in _lists(inputs))
    sizes = torch.full((index.shape[-1],), 128, dtype=torch.int32, device=index.device)
    sizes[-1] = case.tokens - 128 * (len(sizes) - 1)
    lists = dict(q2k_block_nums=count, block_sizes=sizes, sparse_block_size=128)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = function(q, k, v, index, **lists)["o_tensor"]
        return out

    return _prepared(inputs.packed, forward)


BASELINE, BSA = "sdpa", "bsa"
_flash = partial(_sdpa_kernel, SDPBackend.FLASH_ATTENTION)
_sdpa_cudnn = partial(_sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
IMPLEMENTATIONS = {
    BASELINE: Implementation("dense SDPA", _sdpa, is_dense=True),
    BSA: Implementation("bsa-vision", _bsa),
    "sdpa-mask": Implementation("SDPA + mask", _sdpa_mask),
    "flex": Implementation("FlexAttention", _flex),
    "sdpa-flash": Implementation("SDPA, flash", _flash, is_dense=True),
    "sdpa-cudnn": Implementation("SDPA, cuDNN", _sdpa_cudnn, is_dense=True),
    "kernel": Implementation("block_sparse_attn", _kernel),
    "cudnn": Implementation("cuDNN block-sparse", _cudnn),
}
FOR_GPUS = ("sdpa-flash", "sdpa-cudnn", "kernel", "cudnn")

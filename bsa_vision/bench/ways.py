"""The ways to compute one attention call: ours and its peers, each with the reason why it cannot run here.

All get the same numbers and the same masks. Ours takes tokens in model order and orders them itself, inside the timing;
the peers know nothing of token order, so the ones that need it are handed q, k, v in packed order, ready-made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsa_vision.attention.backends import cpu_kernel
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import choose
from bsa_vision.attention.functional import sparse_attention
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.bench.case import Case, Inputs, make_inputs, make_masks
from bsa_vision.bench.machine import free_memory

# A way whose own N x N tensors would take more than this part of the free memory is not tried: estimates are rough, and a
# process that is killed for memory reports nothing.
MEMORY_SHARE = 0.6


@dataclass(frozen=True, eq=False)
class Setup:
    """A case with its tensors; `backend` is what ours is told to use."""

    case: Case
    inputs: Inputs
    masks: HeadMasks
    backend: str = "auto"


def set_up(case: Case, backend: str = "auto") -> Setup:
    return Setup(case, make_inputs(case), make_masks(case), backend)


@dataclass(frozen=True, eq=False)
class Ready:
    """A way prepared for one setup.

    run     one call: (out,), or with backward (out, dq, dk, dv) and with relative position also (drel_h, drel_w)
    packed  whether those come in packed order; else in model order
    detail  which backend runs, where there is a choice
    """

    run: Callable[[], tuple[Tensor, ...]]
    packed: bool
    detail: str = ""


class Way(NamedTuple):
    """One way: its title in tables, why it cannot run a setup (None = it can), and how it is made ready, untimed."""

    title: str
    why_not: Callable[[Setup], str | None]
    prepare: Callable[[Setup], Ready]
    masked: bool = True  # whether it applies the block masks
    biased: bool = True  # whether it adds the relative position


def _ready(
    inputs: Inputs, forward: Callable[..., Tensor], *, packed: bool, rel_pos: RelPos | None = None, detail: str = ""
) -> Ready:
    """`forward(q, k, v, *rel_pos)`, with its gradients where the case asks for them."""
    tensors: tuple[Tensor, ...] = (inputs.q, inputs.k, inputs.v, *(rel_pos or ()))
    if inputs.grad is None:

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(*tensors),)

        return Ready(run, packed, detail)
    leaves = tuple(x.detach().requires_grad_() for x in tensors)

    def run_backward() -> tuple[Tensor, ...]:
        out = forward(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad))

    return Ready(run_backward, packed, detail)


# Ours


def _ours_why_not(setup: Setup) -> str | None:
    return None  # `prepare` raises BackendUnavailable with the backend's own sentence


def _ours(setup: Setup) -> Ready:
    inputs, masks, backend = setup.inputs, setup.masks, setup.backend
    problem = Problem(inputs.q, inputs.k, inputs.v, masks, inputs.scale, rel_pos=inputs.rel_pos)
    name = choose(problem, backend)
    if name == "gather":
        name = f"gather, {cpu_kernel.flavour(problem)}"

    def forward(q: Tensor, k: Tensor, v: Tensor, *rel: Tensor) -> Tensor:
        out = sparse_attention(q, k, v, masks, rel_pos=RelPos(*rel) if rel else None, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return _ready(inputs, forward, packed=False, rel_pos=inputs.rel_pos, detail=name)


# Torch's own attention: dense, dense with the relative position spelled out, and with the mask spelled out


def _always(setup: Setup) -> str | None:
    return None


def _sdpa(setup: Setup) -> Ready:
    return _ready(setup.inputs, F.scaled_dot_product_attention, packed=False)


def _bias_why_not(setup: Setup) -> str | None:
    case = setup.case
    return _too_big(setup, "bias", case.batch * case.heads * case.tokens**2 * case.torch_dtype.itemsize)


def _sdpa_bias(setup: Setup) -> Ready:
    return _with_bias(setup, None)


def _mask_why_not(setup: Setup) -> str | None:
    case, itemsize = setup.case, setup.case.torch_dtype.itemsize
    if setup.inputs.rel_pos is not None:  # the bias, and masked once more
        return _too_big(setup, "bias", 2 * case.batch * case.heads * case.tokens**2 * itemsize)
    # One byte per entry, and torch makes a mask of q's dtype of it in every call.
    return _too_big(setup, "mask", _mask_heads(setup.masks, case.tokens) * case.tokens**2 * (1 + itemsize))


def _sdpa_mask(setup: Setup) -> Ready:
    mask = _token_mask(setup)
    if setup.inputs.rel_pos is not None:
        return _with_bias(setup, mask)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _ready(setup.inputs.packed, forward, packed=True)


def _with_bias(setup: Setup, mask: Tensor | None) -> Ready:
    """SDPA with the (B, H, N, N) bias: made beforehand for a forward, inside the timing where it needs a gradient."""
    packed = setup.inputs.packed
    assert packed.rel_pos is not None

    def forward(q: Tensor, k: Tensor, v: Tensor, *rel: Tensor) -> Tensor:
        bias = _bias(packed, RelPos(*rel), mask) if rel else ready_made
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    if setup.case.backward:
        return _ready(packed, forward, packed=True, rel_pos=packed.rel_pos)
    ready_made = _bias(packed, packed.rel_pos, mask)
    return _ready(packed, forward, packed=True)


def _bias(packed: Inputs, rel_pos: RelPos, mask: Tensor | None) -> Tensor:
    row, column = packed.places
    bias = rel_pos.rel_h.index_select(3, row) + rel_pos.rel_w.index_select(3, column)  # (B, H, N, N)
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def _mask_heads(masks: HeadMasks, tokens: int) -> int:
    """How many heads the spelled-out mask needs: one where all heads share it, as anyone using SDPA would do."""
    blocks = masks.block_mask(tokens, tokens)[0]
    return 1 if bool((blocks == blocks[:1]).all()) else len(blocks)


def _token_mask(setup: Setup) -> Tensor:
    """(1, H or 1, N, N) bool in packed order."""
    tokens, block_of = setup.case.tokens, setup.case.layout.block_of
    blocks = setup.masks.block_mask(tokens, tokens)[:, : _mask_heads(setup.masks, tokens)]
    device = setup.inputs.q.device
    index = block_of.to(device)
    return blocks.to(device).index_select(2, index).index_select(3, index)


def _too_big(setup: Setup, what: str, needed: int) -> str | None:
    needed *= 2 if setup.case.backward else 1
    free = free_memory(setup.case.device)
    if needed <= MEMORY_SHARE * free:
        return None
    return f"the {what} would need {needed / 1e9:.1f} GB for {setup.case.tokens:,} tokens, {free / 1e9:.1f} GB are free"


# FlexAttention, compiled


def _flex_why_not(setup: Setup) -> str | None:
    if setup.case.backward and setup.inputs.q.device.type == "cpu":
        return "FlexAttention has no backward on the CPU"
    return None


def _flex(setup: Setup) -> Ready:
    packed = setup.inputs.packed
    flex_attention = _compiled(setup)
    block_mask = _flex_mask(setup)
    row, column = packed.places

    def forward(q: Tensor, k: Tensor, v: Tensor, *rel: Tensor) -> Tensor:
        if not rel:
            out: Tensor = flex_attention(q, k, v, block_mask=block_mask)
            return out
        rel_h, rel_w = rel

        def add_rel_pos(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + rel_h[b, h, q_idx, row[kv_idx]] + rel_w[b, h, q_idx, column[kv_idx]]

        biased: Tensor = flex_attention(q, k, v, score_mod=add_rel_pos, block_mask=block_mask)
        return biased

    return _ready(packed, forward, packed=True, rel_pos=packed.rel_pos)


def _flex_mask(setup: Setup) -> Any:
    """The BlockMask straight from the block lists, every kept block a full one; nothing N x N is built."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens = setup.case.tokens
    blocks = setup.masks.block_mask(tokens, tokens).to(setup.inputs.q.device)  # (1, H, R, C)
    count = blocks.sum(-1, dtype=torch.int32)
    index = blocks.int().argsort(dim=-1, descending=True, stable=True).int()  # kept blocks first, ascending
    none = torch.zeros_like(count), torch.zeros_like(index)
    size = setup.case.block_size
    return BlockMask.from_kv_blocks(*none, count, index, BLOCK_SIZE=size, seq_lengths=(tokens, tokens))


_compiled_for: list[object] = []  # what the present compiled graphs were made for, at most RECOMPILES of them
RECOMPILES = 6


def _compiled(setup: Setup) -> Callable[..., Any]:
    """FlexAttention compiled for fixed shapes. Graphs of other shapes are dropped before torch's limit on them is met:
    beyond it FlexAttention would run uncompiled, with every score spelled out."""
    case = setup.case
    key = (case.grid, case.heads, case.head_dim, case.dtype, case.device, case.batch, case.block_size, case.backward)
    # A relative position comes as a new function each time, which may count as a new graph.
    if case.rel_pos or key not in _compiled_for:
        if len(_compiled_for) >= RECOMPILES:
            torch._dynamo.reset()
            _compiled_for.clear()
        _compiled_for.append(key)
    return _flex_function()


@cache
def _flex_function() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    cpu_kernel: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return cpu_kernel


# On GPUs: torch's own kernels one by one, and the block-sparse ones called by hand


def _on_a_gpu(setup: Setup) -> str | None:
    return None if setup.inputs.q.is_cuda else "it runs on CUDA"


def _sdpa_by(kind: str) -> Callable[[Setup], Ready]:
    def prepare(setup: Setup) -> Ready:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, kind)):
                return F.scaled_dot_product_attention(q, k, v)

        return _ready(setup.inputs, forward, packed=False)

    return prepare


def _by_hand_why_not(package: str) -> Callable[[Setup], str | None]:
    def why_not(setup: Setup) -> str | None:
        if setup.inputs.rel_pos is not None:
            return "it adds no relative position"
        if package == "cudnn" and setup.case.backward:
            return "its gradient is not tried by hand"
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"{package} cannot be imported: {error}"
        return _on_a_gpu(setup)

    return why_not


def _kernel_by_hand(setup: Setup) -> Ready:
    function = importlib.import_module("block_sparse_attn").block_sparse_attn_func
    case, device = setup.case, setup.inputs.q.device
    base = setup.masks.block_mask(case.tokens, case.tokens).to(device).expand(case.batch, -1, -1, -1).contiguous()
    ends = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.tokens
    types = torch.ones(case.heads, dtype=torch.int32, device=device)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out: Tensor = function(*tokens, ends, ends, types, None, base, case.tokens, case.tokens, 0.0)
        return out.unflatten(0, (case.batch, -1)).transpose(1, 2)

    return _ready(setup.inputs.packed, forward, packed=True)


def _cudnn_by_hand(setup: Setup) -> Ready:
    function = importlib.import_module("cudnn.block_sparse_attention").block_sparse_attention_forward
    case, device = setup.case, setup.inputs.q.device
    blocks = setup.masks.block_mask(case.tokens, case.tokens).to(device).expand(case.batch, -1, -1, -1)
    index = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    nums = blocks.sum(-1, dtype=torch.int32)
    sizes = torch.full((index.shape[-1],), 128, dtype=torch.int32, device=device)
    sizes[-1] = case.tokens - 128 * (len(sizes) - 1)
    lists = dict(q2k_block_nums=nums, block_sizes=sizes, sparse_block_size=128)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = function(q, k, v, index, **lists)["o_tensor"]
        return out

    return _ready(setup.inputs.packed, forward, packed=True)


BASELINE = "sdpa"
WAYS: dict[str, Way] = {
    "sdpa": Way("dense SDPA", _always, _sdpa, masked=False, biased=False),
    "sdpa-bias": Way("dense SDPA + bias", _bias_why_not, _sdpa_bias, masked=False),
    "ours": Way("ours", _ours_why_not, _ours),
    "sdpa-mask": Way("SDPA + mask", _mask_why_not, _sdpa_mask),
    "flex": Way("FlexAttention", _flex_why_not, _flex),
    "sdpa-flash": Way("SDPA, flash", _on_a_gpu, _sdpa_by("FLASH_ATTENTION"), masked=False, biased=False),
    "sdpa-cudnn": Way("SDPA, cuDNN", _on_a_gpu, _sdpa_by("CUDNN_ATTENTION"), masked=False, biased=False),
    "kernel": Way("block_sparse_attn", _by_hand_why_not("block_sparse_attn"), _kernel_by_hand),
    "cudnn": Way("cuDNN block-sparse", _by_hand_why_not("cudnn"), _cudnn_by_hand),
}
FOR_GPUS = ("sdpa-flash", "sdpa-cudnn", "kernel", "cudnn")

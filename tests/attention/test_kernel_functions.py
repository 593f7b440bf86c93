"""The kernel's own functions, with its signature, against an independent oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bsa_vision as bsa
from tests.attention.test_functional import close, int32
from tests.helpers import oracle
from tests.helpers.calls import attend
from tests.helpers.problems import Varlen, varlens


def run_varlen(problem: Varlen, backend: str, **options):
    """Run a packed problem on one backend; block_sparse_attn_func has no such argument."""
    raw = (problem.head_mask_type, problem.streaming_info, problem.base_blockmask)
    result = attend(
        raw,
        *(x.transpose(0, 1)[None] for x in (problem.q, problem.k, problem.v)),
        scale=problem.scale,
        backend=backend,
        cu_seqlens=(problem.cu_q, problem.cu_k),
        max_seqlens=problem.max_seqlens,
        is_causal=problem.causal,
        exact_streaming=problem.exact,
        **options,
    )
    return result.out[0].transpose(0, 1), result.lse


class TestKernelFunctions:
    """The functions of the block_sparse_attn package."""

    @settings(max_examples=40, deadline=None)
    @given(varlens(max_tokens=200))
    def test_equals_the_oracle(self, problem):
        out, lse, probs = problem.call(bsa.block_sparse_attn_func, return_attn_probs=True)
        expected, expected_lse = oracle.attend(
            problem.q,
            problem.k,
            problem.v,
            problem.cu_q.tolist(),
            problem.cu_k.tolist(),
            problem.head_mask_type.tolist(),
            None if problem.streaming_info is None else problem.streaming_info.tolist(),
            problem.base_blockmask,
            problem.causal,
            problem.exact,
            problem.scale,
            max_seqlen=problem.max_seqlens[0],
        )
        assert torch.allclose(out, expected, atol=1e-10)
        assert lse.dtype == torch.float32
        assert torch.allclose(lse.double(), expected_lse, atol=1e-5)
        assert probs.numel() == 0

    @settings(max_examples=300, deadline=None)
    @given(varlens(exact=False))
    def test_every_backend_equals_reference(self, problem):
        expected, expected_lse = run_varlen(problem, "reference", return_lse=True)
        for backend in ("sdpa", "gather"):
            out, _ = run_varlen(problem, backend)
            assert torch.allclose(out, expected, atol=1e-10), backend
        out, lse = run_varlen(problem, "gather", return_lse=True)
        assert torch.allclose(out, expected, atol=1e-10)
        assert torch.allclose(lse, expected_lse, atol=1e-10)

    @settings(max_examples=30, deadline=None)
    @given(varlens(exact=False), st.integers(0, 2**20))
    def test_gradients_equal_references(self, problem, seed):
        inputs = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
        grad = torch.randn(
            problem.q.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        wanted = torch.autograd.grad(run_varlen(problem, "reference")[0], inputs, grad)
        for backend in ("sdpa", "gather"):
            got = torch.autograd.grad(run_varlen(problem, backend)[0], inputs, grad)
            for a, b in zip(got, wanted):
                assert torch.allclose(a, b, atol=1e-9), backend

    def test_empty_rows_give_zero_and_infinity(self):
        q, k, v = (torch.randn(256, 1, 8) for _ in range(3))
        cu = int32(0, 256)
        base = torch.tensor([[[[True, True], [False, False]]]])
        out, lse, _ = bsa.block_sparse_attn_func(
            q, k, v, cu, cu, int32(1), None, base, 256, 256, 0.0, return_attn_probs=True
        )
        assert (out[128:] == 0).all()
        assert (out[:128] != 0).any()
        assert torch.isposinf(lse[0, 0, 128:]).all()
        assert lse[0, 0, :128].isfinite().all()

    def test_streaming_functions(self):
        q, k, v = (torch.randn(260, 2, 8, dtype=torch.float64) for _ in range(3))
        cu, types, info = int32(0, 260), int32(-1, 0), int32(1, 1, 0, 0)
        for causal in (True, False):
            out = bsa.block_streaming_attn_func(
                q, k, v, cu, cu, types, info, 260, 260, 0.0, is_causal=causal
            )
            expected, _ = oracle.attend(
                q, k, v, [0, 260], [0, 260], [-1, 0], info.tolist(), None, causal
            )
            close(out, expected)
        info = int32(3, 50, 0, 0)
        out = bsa.token_streaming_attn_func(q, k, v, cu, cu, types, info, 260, 260)
        expected, _ = oracle.attend(
            q, k, v, [0, 260], [0, 260], [-1, 0], info.tolist(), None, True, True
        )
        close(out, expected)

    def test_streaming_is_not_a_local_window(self):
        """All rows attend to the last blocks of the sequence, if the call is not causal."""
        q, k, v = (torch.randn(512, 1, 8, dtype=torch.float64) for _ in range(3))
        cu, types, info = int32(0, 512), int32(-1), int32(0, 1)
        out = bsa.block_streaming_attn_func(
            q, k, v, cu, cu, types, info, 512, 512, 0.0, is_causal=False
        )
        last = (x.transpose(0, 1) for x in (q, k[384:], v[384:]))
        close(out, F.scaled_dot_product_attention(*last).transpose(0, 1))

    def test_a_script_runs_with_only_its_import_changed(self):
        script = """
from bsa_vision import block_sparse_attn_func
import torch
q, k, v = (torch.randn(2 * 300, 4, 64, dtype=torch.bfloat16) for _ in range(3))
cu_seqlens = torch.arange(0, 601, 300, dtype=torch.int32)
head_mask_type = torch.tensor([0, 1, 1, -1], dtype=torch.int32)
streaming_info = torch.tensor([1, 1] * 4, dtype=torch.int32)
base_blockmask = torch.rand(2, 2, 3, 3) < 0.5
out, lse, S_dmask = block_sparse_attn_func(
    q, k, v, cu_seqlens, cu_seqlens, head_mask_type, streaming_info, base_blockmask, 300, 300, 0.0,
    deterministic=False, softmax_scale=None, is_causal=False, exact_streaming=False,
    return_attn_probs=True)
"""
        names: dict = {}
        exec(script, names)
        assert names["out"].shape == (600, 4, 64)
        assert names["out"].dtype == torch.bfloat16
        assert names["lse"].shape == (2, 4, 300)


def good_varlen():
    q, k, v = (torch.randn(500, 2, 8) for _ in range(3))
    cu, base = int32(0, 200, 500), torch.ones(2, 1, 3, 3, dtype=torch.bool)
    return {
        **dict(q=q, k=k, v=v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q_=300),
        **dict(max_seqlen_k_=300, head_mask_type=int32(0, 1), streaming_info=None),
        **dict(base_blockmask=base, p_dropout=0.0),
    }


BAD_VARLENS = {
    "boundaries start": (
        dict(cu_seqlens_q=int32(1, 200, 500)),
        r"cu_seqlens_q=\[1, 200, 500\].*start at 0",
    ),
    "boundaries end": (
        dict(cu_seqlens_k=int32(0, 200, 499)),
        r"cu_seqlens_k=\[0, 200, 499\].*end at 500",
    ),
    "boundaries fall": (
        dict(cu_seqlens_q=int32(0, 600, 500)),
        r"never decrease.*cumulative sum",
    ),
    "boundaries dtype": (
        dict(cu_seqlens_q=torch.tensor([0, 200, 500])),
        r"cu_seqlens_q is torch.int64.*int32",
    ),
    "batches": (
        dict(cu_seqlens_k=int32(0, 500), max_seqlen_k_=500),
        r"for 2 sequences.*for 1",
    ),
    "longest": (
        dict(max_seqlen_q_=256),
        r"max_seqlen_q_=256 is less than the longest sequence.*300",
    ),
    "mask shape": (
        dict(base_blockmask=torch.ones(2, 1, 2, 3, dtype=torch.bool)),
        r"\(2, 1, 2, 3\): expected \(2, S, 3, 3\)",
    ),
    "mask dtype": (
        dict(base_blockmask=torch.ones(2, 1, 3, 3)),
        r"dtype torch.float32: expected torch.bool",
    ),
    "too few slices": (
        dict(head_mask_type=int32(1, 1)),
        r"2 ones, base_blockmask 1 slices.*add slices",
    ),
    "no mask": (dict(base_blockmask=None), r"1 ones, base_blockmask 0 slices"),
    "heads": (
        dict(head_mask_type=int32(1)),
        r"head_mask_type has shape \(1,\), q has 2 heads",
    ),
    "streaming": (
        dict(head_mask_type=int32(-1, 1)),
        r"streaming_info is None: pass \[sink, local\]",
    ),
    "exact": (dict(exact_streaming=True), r"exact streaming is causal only; pass is_causal=True"),
    "a list of heads": (
        dict(head_mask_type=[0, 1]),
        r"head_mask_type is a list: expected an \(H,\) int32 tensor",
    ),
    "a list of boundaries": (
        dict(cu_seqlens_q=[0, 200, 500]),
        r"cu_seqlens_q is a list: .* use torch.tensor",
    ),
    "dropout": (dict(p_dropout=1.0), r"dropout 1.0: expected a probability"),
    "longest type": (dict(max_seqlen_k_=None), r"max_seqlen_k_ is None: expected an int"),
    "scale": (dict(softmax_scale="x"), r"scale is 'x': expected a number"),
    "rank": (dict(q=torch.randn(1, 2, 500, 8)), r"expected \(total, H, D\)"),
}


@pytest.mark.parametrize("name", BAD_VARLENS)
def test_bad_kernel_calls(name):
    change, message = BAD_VARLENS[name]
    bsa.block_sparse_attn_func(**good_varlen())
    with pytest.raises((ValueError, TypeError), match=message):
        bsa.block_sparse_attn_func(**{**good_varlen(), **change})

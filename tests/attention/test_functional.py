"""The attention call: `reference` against an independent oracle, every backend against `reference`, gradients, edges."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bsa_vision as bsa
from bsa_vision import masks
from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.attention.functional import attend_masks
from bsa_vision.attention.rel_pos import decompose
from bsa_vision.masks import TokenLayout, local_window, random_blocks, stack_heads
from tests.helpers import oracle
from tests.helpers.calls import attend
from tests.helpers.problems import Varlen, varlens

CPU_BACKENDS = ["reference", "sdpa", "gather"]


def qkv(
    batch,
    heads,
    tokens,
    dim,
    *,
    key_heads=None,
    key_tokens=None,
    value_dim=None,
    dtype=torch.float64,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(
        batch,
        key_heads or heads,
        key_tokens or tokens,
        dim,
        generator=generator,
        dtype=torch.float64,
    )
    v = torch.randn(*k.shape[:3], value_dim or dim, generator=generator, dtype=torch.float64)
    return tuple(
        (x * 1.5).to(dtype).requires_grad_() for x in (q, k, v)
    )  # logits of standard deviation about 2


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max()


def run_varlen(problem: Varlen, backend: str, **options):
    """The drop-in functions choose by themselves; tests name the backend."""
    raw = (problem.head_mask_type, problem.streaming_info, problem.base_blockmask)
    result = attend(
        raw,
        *(x.transpose(0, 1)[None] for x in (problem.q, problem.k, problem.v)),
        scale=problem.scale,
        backend=backend,
        cu_seqlens=(problem.cu_q, problem.cu_k),
        longest=problem.longest,
        is_causal=problem.causal,
        exact_streaming=problem.exact,
        **options,
    )
    return result.out[0].transpose(0, 1), result.lse


class TestKernelFunctions:
    """block_sparse_attn_func and its two sisters."""

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
            longest=problem.longest[0],
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
        cu = torch.tensor([0, 256], dtype=torch.int32)
        base = torch.tensor([[[[True, True], [False, False]]]])
        out, lse, _ = bsa.block_sparse_attn_func(
            q,
            k,
            v,
            cu,
            cu,
            torch.ones(1, dtype=torch.int32),
            None,
            base,
            256,
            256,
            0.0,
            return_attn_probs=True,
        )
        assert (out[128:] == 0).all()
        assert (out[:128] != 0).any()
        assert torch.isposinf(lse[0, 0, 128:]).all()
        assert lse[0, 0, :128].isfinite().all()

    def test_streaming_functions(self):
        q, k, v = (torch.randn(260, 2, 8, dtype=torch.float64) for _ in range(3))
        cu = torch.tensor([0, 260], dtype=torch.int32)
        types, info = (
            torch.tensor([-1, 0], dtype=torch.int32),
            torch.tensor([1, 1, 0, 0], dtype=torch.int32),
        )
        for causal in (True, False):
            out = bsa.block_streaming_attn_func(
                q, k, v, cu, cu, types, info, 260, 260, 0.0, is_causal=causal
            )
            expected, _ = oracle.attend(
                q, k, v, [0, 260], [0, 260], [-1, 0], info.tolist(), None, causal
            )
            close(out, expected)
        info = torch.tensor([3, 50, 0, 0], dtype=torch.int32)
        out = bsa.token_streaming_attn_func(q, k, v, cu, cu, types, info, 260, 260)
        expected, _ = oracle.attend(
            q, k, v, [0, 260], [0, 260], [-1, 0], info.tolist(), None, True, True
        )
        close(out, expected)

    def test_streaming_is_not_a_local_window(self):
        """Not causal: every row sees the last blocks of the sequence, also the first rows."""
        q, k, v = (torch.randn(512, 1, 8, dtype=torch.float64) for _ in range(3))
        cu = torch.tensor([0, 512], dtype=torch.int32)
        types, info = torch.tensor([-1], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        out = bsa.block_streaming_attn_func(
            q, k, v, cu, cu, types, info, 512, 512, 0.0, is_causal=False
        )
        last = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k[384:], v[384:]))
        ).transpose(0, 1)
        close(out, last)

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
    deterministic=False, softmax_scale=None, is_causal=False, exact_streaming=False, return_attn_probs=True)
"""
        names: dict = {}
        exec(script, names)
        assert names["out"].shape == (600, 4, 64)
        assert names["out"].dtype == torch.bfloat16
        assert names["lse"].shape == (2, 4, 300)


class TestBackends:
    """sparse_attention on each backend."""

    @settings(max_examples=200, deadline=None)
    @given(
        grid=st.tuples(st.integers(1, 13), st.integers(1, 13)),
        start=st.integers(0, 5),
        end=st.integers(0, 3),
        order=st.sampled_from(["raster", "tile"]),
        tile=st.tuples(st.integers(1, 4), st.integers(1, 6)),
        block=st.sampled_from([4, 16, 32]),
        radius=st.integers(0, 4),
        dense=st.integers(0, 2),
        batch=st.integers(1, 2),
        group=st.integers(1, 2),
        seed=st.integers(0, 99),
    )
    def test_every_backend_equals_reference(
        self, grid, start, end, order, tile, block, radius, dense, batch, group, seed
    ):
        layout = TokenLayout(
            grid,
            num_prefix_tokens=start,
            num_suffix_tokens=end,
            order=order,
            tile=tile,
            block_size=block,
        )
        base = stack_heads([local_window(layout, radius), random_blocks(layout, 0.7, seed)], batch)
        hm = bsa.HeadMasks(base, [0] * dense + [1, 1] + [0] * (dense % 2), layout=layout)
        heads = hm.num_heads * group
        hm = (
            bsa.HeadMasks(base, [t for t in hm.slices for _ in range(group)], layout=layout)
            if group > 1
            else hm
        )
        q, k, v = qkv(
            batch, heads, layout.num_tokens, 8, key_heads=heads // group, value_dim=6, seed=seed
        )
        expected = bsa.sparse_attention(q, k, v, hm, backend="reference")
        close(expected, masked_softmax(q, k, v, hm))
        for backend in ("sdpa", "gather", "auto"):
            close(bsa.sparse_attention(q, k, v, hm, backend=backend), expected)

    def test_twin_another_mask_differs(self):
        """The comparison above can fail: one key block less changes the result by far more than its tolerance."""
        hm, q, k, v = small_problem()
        base = hm.base_blockmask.clone()
        base[0, 0, 1, 0] = ~base[0, 0, 1, 0]
        other = bsa.HeadMasks(base, hm.slices, layout=hm.layout)
        a, b = (bsa.sparse_attention(q, k, v, m, backend="gather") for m in (hm, other))
        assert (a - b).abs().max() > 1e-2

    def test_order_matters(self):
        hm, q, k, v = small_problem(order="tile")
        as_raster = bsa.HeadMasks(hm.base_blockmask, hm.slices, block_size=hm.block_size)
        a, b = (bsa.sparse_attention(q, k, v, m) for m in (hm, as_raster))
        assert (a - b).abs().max() > 1e-2

    @pytest.mark.parametrize("backend", ["sdpa", "gather"])
    @pytest.mark.parametrize("order", ["raster", "tile"])
    def test_gradcheck(self, backend, order):
        hm, *inputs = small_problem(order=order, grid=(2, 5), dim=2)
        assert torch.autograd.gradcheck(
            lambda q, k, v: bsa.sparse_attention(q, k, v, hm, backend=backend), inputs
        )

    @pytest.mark.parametrize("backend", ["sdpa", "gather"])
    def test_gradients_equal_references(self, backend):
        hm, q, k, v = small_problem(order="tile")
        grad = torch.randn(q.shape, dtype=q.dtype)
        wanted = torch.autograd.grad(
            bsa.sparse_attention(q, k, v, hm, backend="reference"), (q, k, v), grad
        )
        got = torch.autograd.grad(
            bsa.sparse_attention(q, k, v, hm, backend=backend), (q, k, v), grad
        )
        for a, b in zip(got, wanted):
            close(a, b)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_low_precision_within_the_error_of_dense_attention(self, backend, dtype):
        """Budget: what torch's own attention loses in this dtype on the same masked problem, and its rounding."""
        hm, *exact = small_problem(order="tile", grid=(9, 14), dim=32)
        q, k, v = (x.detach().to(dtype) for x in exact)
        wide = (x.double() for x in (q, k, v))
        expected = bsa.sparse_attention(*wide, hm, backend="reference")
        out = bsa.sparse_attention(q, k, v, hm, backend=backend)
        assert out.dtype == dtype
        eager = eager_attention(q, k, v, hm)
        budget = (eager.double() - expected).abs().max() + torch.finfo(
            dtype
        ).eps * expected.abs().max()
        assert (out.double() - expected).abs().max() <= 2 * budget

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_strided_inputs(self, backend):
        hm, q, k, v = small_problem()
        contiguous = bsa.sparse_attention(q, k, v, hm, backend=backend)
        strided = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        close(bsa.sparse_attention(*strided, hm, backend=backend), contiguous)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_cross_attention_with_layouts_of_their_own(self, backend):
        q_layout = TokenLayout((3, 5), order="tile", tile=(2, 2), block_size=4)
        kv_layout = TokenLayout(
            (7, 6), num_suffix_tokens=2, order="tile", tile=(2, 2), block_size=4
        )
        base = torch.rand(1, 2, q_layout.num_blocks, kv_layout.num_blocks) < 0.5
        base[..., 0] = True
        hm = bsa.HeadMasks(base, layout=q_layout, kv_layout=kv_layout)
        q, k, v = qkv(2, 2, 15, 8, key_tokens=44)
        close(bsa.sparse_attention(q, k, v, hm, backend=backend), masked_softmax(q, k, v, hm))

    def test_batch_of_masks(self):
        base = torch.rand(3, 2, 4, 4) < 0.5
        base |= torch.eye(4, dtype=torch.bool)
        hm = bsa.HeadMasks(base, block_size=16)
        q, k, v = qkv(3, 2, 50, 8)
        for backend in CPU_BACKENDS:
            close(bsa.sparse_attention(q, k, v, hm, backend=backend), masked_softmax(q, k, v, hm))

    def test_results_do_not_depend_on_run_or_thread(self):
        hm, q, k, v = small_problem(order="tile", grid=(20, 30), dim=16, dtype=torch.float32)
        with torch.no_grad():
            first = bsa.sparse_attention(q, k, v, hm)
            results = [None] * 24

            def call(i):
                with torch.no_grad():
                    results[i] = bsa.sparse_attention(q, k, v, hm)

            threads = [threading.Thread(target=call, args=(i,)) for i in range(len(results))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert all(torch.equal(result, first) for result in results)

    def test_thread_settings_are_left_alone(self):
        before = torch.get_num_threads()
        hm, q, k, v = small_problem()
        bsa.sparse_attention(q, k, v, hm)
        assert torch.get_num_threads() == before
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [before]

    def test_inference_mode_and_back(self):
        hm, q, k, v = small_problem(dtype=torch.float32)
        expected = bsa.sparse_attention(q, k, v, hm).detach()
        with torch.inference_mode():
            inside = bsa.sparse_attention(q, k, v, hm)
        assert torch.equal(inside, expected)
        assert torch.equal(bsa.sparse_attention(q, k, v, hm), expected)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_first_used_in_inference_mode_then_trained(self, backend):
        """What is remembered from call to call must not be inference tensors, which no gradient can go through."""
        hm, q, k, v = small_problem(order="tile", grid=(7, 11))
        with torch.inference_mode():
            bsa.sparse_attention(q, k, v, hm, backend=backend)
        bsa.sparse_attention(q, k, v, hm, backend=backend).sum().backward()
        assert v.grad.abs().sum() > 0

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_autocast_casts_inputs_and_nothing_inside(self, backend):
        hm, q, k, v = small_problem(dtype=torch.float32)
        expected = bsa.sparse_attention(*(x.bfloat16() for x in (q, k, v)), hm, backend=backend)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            inside = bsa.sparse_attention(q, k, v, hm, backend=backend)
            assert inside.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert torch.equal(inside, expected)

    def test_compile_fullgraph(self):
        hm, q, k, v = small_problem(order="tile")
        grad = torch.randn(q.shape, dtype=q.dtype)
        compiled = torch.compile(
            lambda *x: bsa.sparse_attention(*x, hm) * 2,
            fullgraph=True,
            backend="aot_eager",
            dynamic=False,
        )
        out, expected = compiled(q, k, v), 2 * bsa.sparse_attention(q, k, v, hm)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        for a, b in zip(
            torch.autograd.grad(out, (q, k, v), grad),
            torch.autograd.grad(expected, (q, k, v), grad),
        ):
            close(a, b)

    def test_compile_the_kernels_function(self):
        q, k, v = (torch.randn(300, 2, 16) for _ in range(3))
        cu, types = (
            torch.tensor([0, 300], dtype=torch.int32),
            torch.tensor([0, 1], dtype=torch.int32),
        )
        base = torch.rand(1, 1, 3, 3) < 0.6
        arguments = (q, k, v, cu, cu, types, None, base, 300, 300, 0.0)
        compiled = torch.compile(bsa.block_sparse_attn_func, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), bsa.block_sparse_attn_func(*arguments))

    def test_compiled_calls_draw_dropout_anew(self):
        """Two calls alike but for their dropout mask must not be merged into one."""
        hm, q, k, v = small_problem()
        call = lambda: bsa.sparse_attention(q, k, v, hm, dropout_p=0.5)  # noqa: E731
        compiled = torch.compile(
            lambda: call() - call(), fullgraph=True, backend="aot_eager_decomp_partition"
        )
        assert compiled().abs().max() > 0.1

    def test_compiled_calls_check_boundaries(self):
        """Under a compiler nobody reads cu_seqlens before the operator does; wrong ones must not leave output unwritten."""
        q = torch.randn(300, 1, 8)
        cu, types = torch.tensor([0, 100], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        compiled = torch.compile(
            lambda: bsa.block_sparse_attn_func(q, q, q, cu, cu, types, None, None, 300, 300, 0.0),
            backend="aot_eager",
        )
        with pytest.raises(Exception, match=r"cu_seqlens_q=\[0, 100\].*end at 300"):
            compiled()

    def test_nan_is_not_hidden(self):
        q, k, v = (torch.randn(300, 1, 8) for _ in range(3))
        q[299] = torch.nan
        cu, types = torch.tensor([0, 300], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        base = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
        out = bsa.block_sparse_attn_func(
            q, k, v, cu, cu, types, None, base, 300, 300, 0.0, is_causal=True
        )
        assert out[299].isnan().all()
        assert out[:299].isfinite().all()

    def test_operator_registration(self):
        """torch's own checks of the operator: schema, fake implementation, autograd."""
        from bsa_vision.attention.operator import attention_op

        hm, q, k, v = small_problem(grid=(3, 5), dim=4)
        none = (None,) * 7
        arguments = (
            q,
            k,
            v,
            *none,
            None,
            None,
            hm.handle,
            0,
            0,
            0,
            0,
            0.5,
            False,
            False,
            0.0,
            True,
            "gather",
        )
        torch.library.opcheck(attention_op, arguments)


class TestRelPos:
    def setup_method(self):
        self.layout = TokenLayout((6, 9), order="tile", tile=(2, 4), block_size=8)
        base = stack_heads([local_window(self.layout, 1), random_blocks(self.layout, 0.5, 3)], 1)
        self.masks = bsa.HeadMasks(base, [0, 1, 1], layout=self.layout)
        self.inputs = qkv(2, 3, 54, 8)
        generator = torch.Generator().manual_seed(5)
        tables = [
            torch.randn(2 * side - 1, 8, generator=generator, dtype=torch.float64) / 2
            for side in (6, 9)
        ]
        self.rel_pos = decompose(self.inputs[0], *tables, (6, 9))
        assert all(term.std() > 1 for term in self.rel_pos)
        self.tables = tables

    def bias(self):
        """add_decomposed_rel_pos, pair by pair."""
        q, (table_h, table_w) = self.inputs[0], self.tables
        bias = torch.zeros(2, 3, 54, 54, dtype=torch.float64)
        for i in range(54):
            for j in range(54):
                rows = table_h[i // 9 - j // 9 + 5]
                columns = table_w[i % 9 - j % 9 + 8]
                bias[:, :, i, j] = q[:, :, i] @ (rows + columns)
        return bias

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_equals_the_bias_built_pair_by_pair(self, backend):
        out = bsa.sparse_attention(*self.inputs, self.masks, rel_pos=self.rel_pos, backend=backend)
        expected = masked_softmax(*self.inputs, self.masks, self.bias())
        close(out, expected)
        without = bsa.sparse_attention(*self.inputs, self.masks, backend=backend)
        assert (without - expected).abs().max() > 0.1

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_autocast(self, backend):
        q, k, v, *terms = (x.detach().float() for x in (*self.inputs, *self.rel_pos))
        expected = bsa.sparse_attention(
            q, k, v, self.masks, rel_pos=bsa.RelPos(*terms), backend=backend
        )
        with torch.autocast("cpu", torch.bfloat16):
            out = bsa.sparse_attention(
                q, k, v, self.masks, rel_pos=bsa.RelPos(*terms), backend=backend
            )
        assert out.dtype == torch.bfloat16
        assert (out - expected).norm() / expected.norm() < 0.05

    def test_gradients(self):
        terms = [term.detach().requires_grad_() for term in self.rel_pos]
        grad = torch.randn(2, 3, 54, 8, dtype=torch.float64)
        results = []
        for backend in CPU_BACKENDS:
            out = bsa.sparse_attention(
                *self.inputs, self.masks, rel_pos=bsa.RelPos(*terms), backend=backend
            )
            results.append(torch.autograd.grad(out, (*self.inputs, *terms), grad))
        for got in results[1:]:
            for a, b in zip(got, results[0]):
                close(a, b)

    def test_errors(self):
        with pytest.raises(
            ValueError, match=r"rel_pos needs HeadMasks with a layout .* pass layout="
        ):
            bsa.sparse_attention(
                *self.inputs, bsa.HeadMasks(None, [0, 0, 0], block_size=8), rel_pos=self.rel_pos
            )
        swapped = bsa.RelPos(self.rel_pos.rel_w, self.rel_pos.rel_h)
        with pytest.raises(ValueError, match=r"rel_pos has shapes .*expected .*\(2, 3, 54, 6\)"):
            bsa.sparse_attention(*self.inputs, self.masks, rel_pos=swapped)
        with pytest.raises(ValueError, match=r"table_h has shape \(5, 8\): expected \(11, 8\)"):
            decompose(self.inputs[0], torch.zeros(5, 8), torch.zeros(17, 8), (6, 9))


class TestDropout:
    @pytest.mark.parametrize("backend", ["reference", "gather"])
    def test_unbiased_and_seeded(self, backend):
        hm, q, k, v = small_problem(grid=(4, 6))
        plain = bsa.sparse_attention(q, k, v, hm, backend=backend).detach()
        with torch.no_grad():
            torch.manual_seed(1)
            draws = torch.stack(
                [
                    bsa.sparse_attention(q, k, v, hm, dropout_p=0.3, backend=backend)
                    for _ in range(400)
                ]
            )
            torch.manual_seed(1)
            again = bsa.sparse_attention(q, k, v, hm, dropout_p=0.3, backend=backend)
        assert torch.equal(draws[0], again)
        assert not torch.equal(draws[0], draws[1])
        error = (draws.mean(0) - plain).abs() / (draws.std(0) / 20 + 1e-12)
        assert error.median() < 1.5
        assert error.max() < 6

    @pytest.mark.parametrize("backend", ["reference", "gather"])
    def test_gradient_sees_the_same_mask(self, backend):
        hm, *inputs = small_problem(grid=(3, 4), dim=3)

        def call(q, k, v):
            torch.manual_seed(7)
            return bsa.sparse_attention(q, k, v, hm, dropout_p=0.4, backend=backend)

        assert torch.autograd.gradcheck(call, inputs)

    def test_dropout_mask_is_returned_by_sign(self):
        q, k, v = (torch.randn(200, 2, 8) for _ in range(3))
        cu, types = torch.tensor([0, 200], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        _, _, probs = bsa.block_sparse_attn_func(
            q, k, v, cu, cu, types, None, None, 200, 200, 0.25, return_attn_probs=True
        )
        assert probs.shape == (1, 2, 256, 256)
        attended = probs[:, :, :200, :200]
        assert abs((attended < 0).float().mean().item() - 0.25) < 0.02
        assert torch.allclose(attended.abs().sum(-1), torch.ones(1, 2, 200), atol=1e-5)


class TestRagged:
    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize("order", ["raster", "tile"])
    def test_list_equals_one_by_one(self, backend, order):
        problems = [
            small_problem(order=order, grid=grid, start=start)
            for grid, start in (((5, 9), 1), ((3, 4), 2))
        ]
        hms, images = [p[0] for p in problems], [[x[0] for x in p[1:]] for p in problems]
        together = bsa.sparse_attention(*zip(*images), hms, backend=backend)
        assert isinstance(together, list)
        for out, (hm, q, k, v) in zip(together, problems):
            close(out, bsa.sparse_attention(q, k, v, hm, backend="reference")[0])

    def test_gradients_flow_through_packing(self):
        problems = [small_problem(grid=grid) for grid in ((5, 9), (3, 4))]
        outs = bsa.sparse_attention(
            *zip(*[[x[0] for x in p[1:]] for p in problems]), [p[0] for p in problems]
        )
        sum(out.square().sum() for out in outs).backward()
        for hm, q, k, v in problems:
            wanted = torch.autograd.grad(
                bsa.sparse_attention(q, k, v, hm, backend="reference").square().sum(), (q, k, v)
            )
            for x, grad in zip((q, k, v), wanted):
                close(x.grad, grad)


def small_problem(order="raster", grid=(5, 9), start=1, dim=8, dtype=torch.float64):
    """One dense and two sparse heads on a small non-square layout."""
    layout = TokenLayout(grid, num_prefix_tokens=start, order=order, tile=(2, 3), block_size=4)
    base = stack_heads([local_window(layout, 1), random_blocks(layout, 0.6, 1)], 1)
    hm = bsa.HeadMasks(base, [0, 1, 1], layout=layout)
    return hm, *qkv(1, 3, layout.num_tokens, dim, dtype=dtype)


def expand(hm, num_q, num_k):
    """(B or 1, H, N, M) bool in model order, spelled out without the code under test."""
    size = hm.block_size
    heads = []
    for kind in hm.slices:
        if kind == 0:
            heads.append(
                torch.ones(1, num_q, num_k, dtype=torch.bool).expand(
                    hm.base_blockmask.shape[0], -1, -1
                )
            )
        else:
            blocks = hm.base_blockmask[:, kind - 1]
            i, j = torch.arange(num_q) // size, torch.arange(num_k) // size
            heads.append(blocks[:, i][:, :, j])
    packed = torch.stack(heads, 1)
    rows = torch.arange(num_q) if hm.layout is None else hm.layout.inverse
    columns = torch.arange(num_k) if hm.kv_layout is None else hm.kv_layout.inverse
    return packed[:, :, rows][:, :, :, columns]


def masked_softmax(q, k, v, hm, bias=0.0):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    return logits.masked_fill(~expand(hm, q.shape[2], k.shape[2]), -torch.inf).softmax(-1) @ v


def eager_attention(q, k, v, hm):
    return masked_softmax(q, k, v, hm)


BAD_CALLS = {
    "rank": (
        lambda q, k, v, hm: (q[0], k, v, hm),
        ValueError,
        r"q \(3, 46, 8\).*expected \(B, H, N, D\).*reshape",
    ),
    "head dim": (
        lambda q, k, v, hm: (q[..., :4], k, v, hm),
        ValueError,
        r"q \(1, 3, 46, 4\).*one head dim",
    ),
    "keys": (
        lambda q, k, v, hm: (q, k, v[:, :, 1:], hm),
        ValueError,
        r"v \(1, 3, 45, 8\).*same heads and tokens",
    ),
    "groups": (
        lambda q, k, v, hm: (q, k[:, :2], v[:, :2], hm),
        ValueError,
        r"3 query heads are not a multiple of 2",
    ),
    "batch": (
        lambda q, k, v, hm: (q.repeat(2, 1, 1, 1), k, v, hm),
        ValueError,
        r"batch sizes differ.*expand",
    ),
    "a list": (
        lambda q, k, v, hm: ([[1.0]], k, v, hm),
        TypeError,
        r"q is a list of 1 images.*one HeadMasks per image",
    ),
    "numpy": (
        lambda q, k, v, hm: (q.detach().numpy(), k, v, hm),
        TypeError,
        r"q is a ndarray: expected a floating point",
    ),
    "integers": (
        lambda q, k, v, hm: (q.long(), k.long(), v.long(), hm),
        TypeError,
        r"q is torch.int64.*convert",
    ),
    "bare mask": (
        lambda q, k, v, hm: (q, k, v, hm.base_blockmask),
        TypeError,
        r"head_masks is a Tensor.*bsa.HeadMasks\(",
    ),
    "dtype": (lambda q, k, v, hm: (q.float(), k, v, hm), TypeError, r"q is torch.float32.*convert"),
    "heads": (
        lambda q, k, v, hm: (*(x[:, :2] for x in (q, k, v)), hm),
        ValueError,
        r"q has 2 heads.*HeadMasks 3",
    ),
    "tokens": (
        lambda q, k, v, hm: (*(x[:, :, :-1] for x in (q, k, v)), hm),
        ValueError,
        r"q has 45 tokens, the layout of the HeadMasks 46 \(1 special \+ 5 x 9 patches \+ 0 special\).*make the masks",
    ),
    "blocks": (
        lambda q, k, v, hm: (
            q,
            k,
            v,
            bsa.HeadMasks(torch.ones(1, 3, 2, 2, dtype=torch.bool), block_size=4),
        ),
        ValueError,
        r"q has 46 tokens in 12 blocks of 4, base_blockmask has shape \(1, 3, 2, 2\).*make the mask",
    ),
    "scattered dtypes": (
        lambda q, k, v, hm: (
            [q[0], q[0].float()],
            [k[0], k[0].float()],
            [v[0], v[0].float()],
            [hm, hm],
        ),
        TypeError,
        r"images are torch.float32 .* and torch.float64 .* one dtype",
    ),
    "one HeadMasks for a list": (
        lambda q, k, v, hm: ([q[0]], [k[0]], [v[0]], hm),
        TypeError,
        r"one HeadMasks per image",
    ),
    "mask batch": (
        lambda q, k, v, hm: (
            q,
            k,
            v,
            bsa.HeadMasks(hm.base_blockmask.repeat(2, 1, 1, 1), [0, 1, 1], layout=hm.layout),
        ),
        ValueError,
        r"q has 1 images, base_blockmask 2",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    change, error, message = BAD_CALLS[name]
    hm, q, k, v = small_problem()
    with pytest.raises(error, match=message):
        bsa.sparse_attention(*change(q, k, v, hm))


def good_varlen():
    q, k, v = (torch.randn(500, 2, 8) for _ in range(3))
    cu, types = (
        torch.tensor([0, 200, 500], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
    )
    base = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    return dict(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        head_mask_type=types,
        streaming_info=None,
        base_blockmask=base,
        max_seqlen_q_=300,
        max_seqlen_k_=300,
        p_dropout=0.0,
    )


INT32 = torch.int32
BAD_VARLENS = {
    "boundaries start": (
        dict(cu_seqlens_q=torch.tensor([1, 200, 500], dtype=INT32)),
        r"cu_seqlens_q=\[1, 200, 500\].*start at 0",
    ),
    "boundaries end": (
        dict(cu_seqlens_k=torch.tensor([0, 200, 499], dtype=INT32)),
        r"cu_seqlens_k=\[0, 200, 499\].*end at 500",
    ),
    "boundaries fall": (
        dict(cu_seqlens_q=torch.tensor([0, 600, 500], dtype=INT32)),
        r"never fall.*cumulative sum",
    ),
    "boundaries dtype": (
        dict(cu_seqlens_q=torch.tensor([0, 200, 500])),
        r"cu_seqlens_q is torch.int64.*int32",
    ),
    "batches": (
        dict(cu_seqlens_k=torch.tensor([0, 500], dtype=INT32), max_seqlen_k_=500),
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
        dict(head_mask_type=torch.tensor([1, 1], dtype=INT32)),
        r"2 ones, base_blockmask 1 slices.*add slices",
    ),
    "no mask": (dict(base_blockmask=None), r"1 ones, base_blockmask 0 slices"),
    "heads": (
        dict(head_mask_type=torch.tensor([1], dtype=INT32)),
        r"head_mask_type has shape \(1,\), q has 2 heads",
    ),
    "streaming": (
        dict(head_mask_type=torch.tensor([-1, 1], dtype=INT32)),
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
    "longest type": (dict(max_seqlen_k_=None), r"max_seqlen_k_ is None: expected the tokens"),
    "scale": (dict(softmax_scale="x"), r"scale is 'x': expected a number"),
    "rank": (dict(q=torch.randn(1, 2, 500, 8)), r"expected \(total, H, D\)"),
}


@pytest.mark.parametrize("name", BAD_VARLENS)
def test_bad_kernel_calls(name):
    change, message = BAD_VARLENS[name]
    bsa.block_sparse_attn_func(**good_varlen())
    with pytest.raises((ValueError, TypeError), match=message):
        bsa.block_sparse_attn_func(**{**good_varlen(), **change})


def test_named_backends_never_fall_back():
    hm, q, k, v = small_problem()
    with pytest.raises(
        bsa.BackendUnavailable,
        match=r"'kernel' cannot run this call: .* Able here: gather, sdpa, reference",
    ):
        bsa.sparse_attention(q, k, v, hm, backend="kernel")
    with pytest.raises(
        ValueError,
        match=r"backend='fast': allowed are 'auto', 'kernel', 'cudnn', 'flex', 'gather', 'sdpa', 'reference'",
    ):
        bsa.sparse_attention(q, k, v, hm, backend="fast")


def test_lists_of_unequal_length():
    hm, q, k, v = small_problem()
    with pytest.raises(ValueError, match=r"2 images in q, 1 in k"):
        bsa.sparse_attention([q[0], q[0]], [k[0]], [v[0]], [hm])
    with pytest.raises(ValueError, match=r"relative position needs one grid"):
        bsa.sparse_attention([q[0]], [k[0]], [v[0]], [hm], rel_pos=bsa.RelPos(q, q))


def test_backend_table_is_what_the_docs_say():
    docs = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", docs, re.MULTILINE) == list(BACKENDS)
    assert masks is bsa.masks


class TestForwardMode:
    """The operator has no forward-mode derivative, and torch would take it for a constant."""

    def function(self, backend):
        q = torch.randn(
            1, 2, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        hm = bsa.HeadMasks(None, [0, 0])
        return lambda scale: (
            bsa.sparse_attention(q * scale, q, q, hm, backend=backend).square().sum()
        )

    def test_is_refused_and_not_zero(self):
        one = torch.ones((), dtype=torch.float64)
        with pytest.raises(
            RuntimeError,
            match=r"forward-mode differentiation \(jvp\) does not reach through 'gather'.*backend='reference'",
        ):
            torch.func.jvp(self.function("gather"), (one,), (one,))
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(RuntimeError, match="forward-mode"),
        ):
            self.function("gather")(torch.autograd.forward_ad.make_dual(one, one))

    def test_works_where_torch_differentiates(self):
        one = torch.ones((), dtype=torch.float64)
        _, slope = torch.func.jvp(self.function("reference"), (one,), (one,))
        f = self.function("gather")
        assert slope == pytest.approx(((f(one + 1e-5) - f(one - 1e-5)) / 2e-5).item(), rel=1e-6)


def test_rel_pos_without_a_layout_is_refused_below_the_checks_as_well():
    """`attend_masks` checks nothing; the compiled loop would read the places of keys through a null pointer."""
    q = torch.randn(1, 2, 16, 8)
    term = torch.randn(1, 2, 16, 4)
    with pytest.raises(ValueError, match="rel_pos needs the patch of each key"):
        attend_masks(
            bsa.HeadMasks(None, [0, 0]), q, q, q, rel_pos=bsa.RelPos(term, term), backend="gather"
        )

"""Attention calls: `reference` against an independent oracle, all backends against `reference`."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bsa_vision as bsa
from bsa_vision.attention.backends.problem import Call
from bsa_vision.masks import TokenLayout, local_window, random_blocks, stack_heads

CPU_BACKENDS = ["reference", "sdpa", "gather"]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def qkv(*shape, key_heads=None, key_tokens=None, value_dim=None, dtype=torch.float64, seed=0):
    """Return q, k and v for a q of this shape; logits have a standard deviation of about 2."""
    batch, heads, tokens, dim = shape
    generator = torch.Generator().manual_seed(seed)
    key_shape = (batch, key_heads or heads, key_tokens or tokens)
    shapes = (shape, (*key_shape, dim), (*key_shape, value_dim or dim))
    tensors = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple((x * 1.5).to(dtype).requires_grad_() for x in tensors)


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max()


class TestBackends:
    """`sparse_attention` on each backend."""

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
        if group > 1:
            hm = bsa.HeadMasks(base, [t for t in hm.slices for _ in range(group)], layout=layout)
        q, k, v = qkv(
            batch, heads, layout.num_tokens, 8, key_heads=heads // group, value_dim=6, seed=seed
        )
        expected = bsa.sparse_attention(q, k, v, hm, backend="reference")
        close(expected, masked_softmax(q, k, v, hm))
        for backend in ("sdpa", "gather", "auto"):
            close(bsa.sparse_attention(q, k, v, hm, backend=backend), expected)

    def test_twin_another_mask_differs(self):
        """One key block changes the result by far more than the tolerance above."""
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
        """The error is at most twice that of torch's attention in this dtype, plus rounding."""
        hm, *exact = small_problem(order="tile", grid=(9, 14), dim=32)
        q, k, v = (x.detach().to(dtype) for x in exact)
        wide = (x.double() for x in (q, k, v))
        expected = bsa.sparse_attention(*wide, hm, backend="reference")
        out = bsa.sparse_attention(q, k, v, hm, backend=backend)
        assert out.dtype == dtype
        eager_error = (masked_softmax(q, k, v, hm).double() - expected).abs().max()
        limit = eager_error + torch.finfo(dtype).eps * expected.abs().max()
        assert (out.double() - expected).abs().max() <= 2 * limit

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_strided_inputs(self, backend):
        hm, q, k, v = small_problem()
        contiguous = bsa.sparse_attention(q, k, v, hm, backend=backend)
        strided = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        close(bsa.sparse_attention(*strided, hm, backend=backend), contiguous)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_cross_attention_with_two_layouts(self, backend):
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
        """Caches must not hold inference tensors, which have no gradients."""
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

    @pytest.mark.slow
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
        got, wanted = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected))
        for a, b in zip(got, wanted):
            close(a, b)

    def test_compile_the_kernels_function(self):
        q, k, v = (torch.randn(300, 2, 16) for _ in range(3))
        cu, types = int32(0, 300), int32(0, 1)
        base = torch.rand(1, 1, 3, 3) < 0.6
        arguments = (q, k, v, cu, cu, types, None, base, 300, 300, 0.0)
        compiled = torch.compile(bsa.block_sparse_attn_func, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), bsa.block_sparse_attn_func(*arguments))

    def test_compiled_calls_draw_dropout_anew(self):
        """The compiler must not merge two calls that differ only in their dropout mask."""
        hm, q, k, v = small_problem()
        call = lambda: bsa.sparse_attention(q, k, v, hm, dropout_p=0.5)  # noqa: E731
        compiled = torch.compile(
            lambda: call() - call(), fullgraph=True, backend="aot_eager_decomp_partition"
        )
        assert compiled().abs().max() > 0.1

    def test_compiled_calls_check_boundaries(self):
        """Under a compiler only the operator reads cu_seqlens, so it must check them."""
        q = torch.randn(300, 1, 8)
        cu, types = int32(0, 100), int32(0)
        compiled = torch.compile(
            lambda: bsa.block_sparse_attn_func(q, q, q, cu, cu, types, None, None, 300, 300, 0.0),
            backend="aot_eager",
        )
        with pytest.raises(Exception, match=r"cu_seqlens_q=\[0, 100\].*end at 300"):
            compiled()

    def test_nan_is_not_hidden(self):
        q, k, v = (torch.randn(300, 1, 8) for _ in range(3))
        q[299] = torch.nan
        cu, types = int32(0, 300), int32(1)
        base = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
        out = bsa.block_sparse_attn_func(
            q, k, v, cu, cu, types, None, base, 300, 300, 0.0, is_causal=True
        )
        assert out[299].isnan().all()
        assert out[:299].isfinite().all()

    def test_operator_registration(self):
        """torch's checks of the operator: schema, fake implementation, autograd."""
        from bsa_vision.attention.operator import attention_op

        hm, q, k, v = small_problem(grid=(3, 5), dim=4)
        call = Call(q, k, v, handle=hm.handle, scale=0.5, return_lse=True, backend="gather")
        torch.library.opcheck(attention_op, tuple(call))


class TestDropout:
    @pytest.mark.parametrize("backend", ["reference", "gather"])
    def test_unbiased_and_seeded(self, backend):
        hm, q, k, v = small_problem(grid=(4, 6))
        plain = bsa.sparse_attention(q, k, v, hm, backend=backend).detach()
        with torch.no_grad():
            torch.manual_seed(1)
            draw = lambda: bsa.sparse_attention(q, k, v, hm, dropout_p=0.3, backend=backend)  # noqa: E731
            draws = torch.stack([draw() for _ in range(400)])
            torch.manual_seed(1)
            again = draw()
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
        cu, types = int32(0, 200), int32(0, 0)
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
            loss = bsa.sparse_attention(q, k, v, hm, backend="reference").square().sum()
            wanted = torch.autograd.grad(loss, (q, k, v))
            for x, grad in zip((q, k, v), wanted):
                close(x.grad, grad)


def small_problem(order="raster", grid=(5, 9), start=1, dim=8, dtype=torch.float64):
    """Return masks of one dense and two sparse heads on a small grid, and q, k and v."""
    layout = TokenLayout(grid, num_prefix_tokens=start, order=order, tile=(2, 3), block_size=4)
    base = stack_heads([local_window(layout, 1), random_blocks(layout, 0.6, 1)], 1)
    hm = bsa.HeadMasks(base, [0, 1, 1], layout=layout)
    return hm, *qkv(1, 3, layout.num_tokens, dim, dtype=dtype)


def expand(hm, num_q, num_k):
    """Return the mask per token, (B or 1, H, N, M) bool in model order, computed independently."""
    size = hm.block_size
    heads = []
    for kind in hm.slices:
        if kind == 0:
            heads.append(torch.ones(len(hm.base_blockmask), num_q, num_k, dtype=torch.bool))
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

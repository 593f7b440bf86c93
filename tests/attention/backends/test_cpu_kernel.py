"""The compiled loop of `gather`: against `reference` in float64 on random problems, each variant; and what it must not do."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bsa_vision as bsa
from bsa_vision.attention.backends import cpu_kernel, gather
from bsa_vision.attention.backends.cpu_kernel import VARIANTS
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.token_order import attend as attend_problem
from bsa_vision.attention.token_order import gradients
from bsa_vision.masks import TokenLayout, local_window, random_blocks, stack_heads
from tests.helpers import calls

HERE = (
    list(VARIANTS)[list(VARIANTS).index(torch.backends.cpu.get_cpu_capability()) :]
    if cpu_kernel.why_not() is None
    else []
)
pytestmark = pytest.mark.skipif(not HERE, reason=f"{cpu_kernel.why_not()}")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Problems here are tiny: on a busy machine, torch's own threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[*HERE, "torch"])
def way(request, monkeypatch):
    """Every variant this machine can run, and `gather` without the compiled loop."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_kernel, "why_not", lambda problem=None: "switched off")
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@st.composite
def problems(draw):
    """(masks, q, k, v, rel_pos, scale) in float64, logits and relative terms of standard deviation 1 and more."""
    block = draw(st.sampled_from([3, 16, 40, 64, 128, 256]))
    order, tile = draw(st.sampled_from(["raster", "tile"])), (2, max(block // 3, 1))
    q_layout = TokenLayout((draw(st.integers(1, 14)), draw(st.integers(1, 23))), num_prefix_tokens=draw(st.integers(0, 3)), order=order, tile=tile, block_size=block)  # fmt: skip
    kv_layout = q_layout
    if draw(st.booleans()):
        kv_layout = TokenLayout((draw(st.integers(1, 14)), draw(st.integers(1, 23))), num_suffix_tokens=draw(st.integers(0, 3)), order=order, tile=tile, block_size=block)  # fmt: skip
    images, groups, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    heads, generator = groups * group, torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    types = [draw(st.sampled_from([0, 1])) for _ in range(heads)]
    base, slices = None, types.count(1)
    if slices:
        batch = draw(st.sampled_from([1, images]))
        shape = (batch, slices, q_layout.num_blocks, kv_layout.num_blocks)
        base = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.4, 0.8]))
        if not draw(st.booleans()):
            base[..., 0] = True
    masks = HeadMasks(
        base, types, layout=q_layout, kv_layout=kv_layout, block_size=block, allow_empty_rows=True
    )

    dim, dim_v = (draw(st.sampled_from([1, 8, 32, 37, 64, 80, 256])) for _ in range(2))
    num_q, num_k = q_layout.num_tokens, kv_layout.num_tokens
    q, k, v = (
        torch.randn(
            images, tokens, heads_, width, generator=generator, dtype=torch.float64
        ).transpose(1, 2)
        * 1.5
        for tokens, heads_, width in (
            (num_q, heads, dim),
            (num_k, groups, dim),
            (num_k, groups, dim_v),
        )
    )
    if draw(st.booleans()):
        q, k, v = (x.contiguous() for x in (q, k, v))
    rel_pos = None
    if kv_layout.num_prefix_tokens == kv_layout.num_suffix_tokens == 0 and draw(
        st.booleans()
    ):  # relative position knows no special tokens
        sides = kv_layout.grid
        rel_pos = bsa.RelPos(*(1.5 * torch.randn(images, heads, num_q, n, generator=generator, dtype=torch.float64) for n in sides))  # fmt: skip
    return masks, q, k, v, rel_pos, draw(st.sampled_from([None, 0.3]))


def attend(problem, backend, dtype=torch.float32, **options):
    masks, q, k, v, rel_pos, scale = problem
    q, k, v = (x.to(dtype) for x in (q, k, v))
    rel_pos = None if rel_pos is None else bsa.RelPos(*(term.to(dtype) for term in rel_pos))
    return calls.attend(masks, q, k, v, rel_pos=rel_pos, scale=scale, backend=backend, **options)


ROUNDING = 2.0**-21  # a few times float32's own


def rounded(x):
    """x with every element off by about a rounding error."""
    return x * (
        1
        + ROUNDING
        * torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()), dtype=x.dtype)
    )


def assert_as_exact_as(eager, result, expected, perturbed, size):
    """Within a few times the errors of plain float32 arithmetic, and of float64 on inputs that were rounded before.

    size   of the numbers that were added up on the way: a sum that should be 0 is not exactly

    The factor allows for the rounded inputs being one draw, which may be a lucky one.
    """
    budget = (
        (eager.double() - expected).abs().max()
        + (perturbed - expected).abs().max()
        + ROUNDING * size
    )
    assert (result.double() - expected).abs().max() <= 4 * budget


class TestForward:
    @settings(max_examples=250, deadline=None)
    @given(problem=problems())
    @pytest.mark.parametrize("capability", HERE)
    def test_equals_reference(self, capability, problem):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
            out, lse, _ = attend(problem, "gather", return_lse=True)
        expected = attend(problem, "reference", torch.float64, return_lse=True)
        eager = attend(problem, "reference", return_lse=True)
        masks, q, k, v, rel_pos, scale = problem
        rel_pos = rel_pos and bsa.RelPos(*map(rounded, rel_pos))
        near = (masks, rounded(q), rounded(k), rounded(v), rel_pos, scale)
        assert_as_exact_as(
            eager.out,
            out,
            expected.out,
            attend(near, "reference", torch.float64).out,
            v.abs().max(),
        )
        assert out.stride() == eager.out.stride()
        finite = expected.lse.isfinite()
        assert torch.equal(lse.isposinf(), expected.lse.isposinf())
        torch.testing.assert_close(lse[finite].double(), expected.lse[finite], rtol=1e-5, atol=1e-5)

    def test_is_what_runs(self, way, monkeypatch):
        """The comparison above is of the variant it names: what it calls is called."""
        called = []
        real = cpu_kernel.variant

        def spy(capability):
            called.append(capability)
            return real(capability)

        monkeypatch.setattr(cpu_kernel, "variant", spy)
        masks, q, k, v = small()
        with torch.no_grad():
            bsa.sparse_attention(q, k, v, masks, backend="gather")
        assert set(called) == ({way} if way != "torch" else set())

    @pytest.mark.parametrize("change", ["one block less", "another order", "no relative position"])
    def test_twin_a_wrong_result_differs(self, way, change):
        masks, q, k, v = small()
        rel_pos = bsa.RelPos(torch.randn(1, 2, 221, 13) * 2, torch.randn(1, 2, 221, 17) * 2)
        base = masks.base_blockmask.clone()
        if change == "one block less":
            base[0, 0, 3, 3] = False
        layout = (
            TokenLayout(masks.layout.grid, block_size=16)
            if change == "another order"
            else masks.layout
        )
        other = HeadMasks(base, layout=layout)
        a = bsa.sparse_attention(q, k, v, masks, rel_pos=rel_pos, backend="gather")
        b = bsa.sparse_attention(
            q, k, v, other, rel_pos=None if change.startswith("no") else rel_pos, backend="gather"
        )
        assert (a - b).abs().max() > 1e-2

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_nan_shows_where_it_is_seen_and_nowhere_else(self, way, name):
        tensors = {x: torch.randn(1, 1, 64, 8) for x in "qkv"}
        masks = HeadMasks(torch.eye(4, dtype=torch.bool)[None, None], block_size=16)
        tensors[name][0, 0, 20] = torch.nan
        out = bsa.sparse_attention(*tensors.values(), masks, backend="gather")
        token = torch.arange(64)
        seen = token == 20 if name == "q" else token // 16 == 1
        assert torch.equal(out[0, 0].isnan(), seen[:, None].expand(-1, 8))

    @pytest.mark.parametrize("size", [1e2, 1e5, 1e18])
    def test_huge_logits(self, way, size):
        masks, q, k, v = small()
        problem = (masks, q.double() * size, k.double(), v.double(), None, None)
        out, expected = attend(problem, "gather").out, attend(problem, "reference").out
        assert out.isfinite().all()
        # Rounding decides between near ties of huge logits; where float64 sees one winner, so must we.
        exact = attend(problem, "reference", torch.float64).out
        clear = (expected.double() - exact).abs().amax(-1) < 1e-4
        assert clear.float().mean() > 0.5
        assert (out.double() - exact).abs().amax(-1)[clear].max() < 1e-2

    def test_infinite_logits_as_reference(self, way):
        masks, q, k, v = small()
        q[0, 0, 5] = torch.inf
        a, b = (
            bsa.sparse_attention(q, k, v, masks, backend=name) for name in ("gather", "reference")
        )
        assert torch.equal(a.isnan(), b.isnan())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_is_computed_in_float32(self, way, dtype):
        masks, q, k, v = (x.to(dtype) if isinstance(x, torch.Tensor) else x for x in small())
        out = bsa.sparse_attention(q, k, v, masks, backend="gather")
        wide = bsa.sparse_attention(q.float(), k.float(), v.float(), masks, backend="gather")
        assert out.dtype == dtype
        assert torch.equal(out, wide.to(dtype))

    def test_strided_inputs_are_not_copied(self, monkeypatch):
        """Token-major projections, as models have them, are read where they lie."""
        masks, q, k, v = small()
        packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)  # (B, N, 3, H, D)
        views = packed.permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        batches = []
        real = cpu_kernel._describe
        monkeypatch.setattr(
            cpu_kernel, "_describe", lambda *args: batches.append(real(*args)) or batches[-1]
        )
        with torch.no_grad():
            out = bsa.sparse_attention(*views, masks, backend="gather")
            assert torch.equal(out, bsa.sparse_attention(q, k, v, masks, backend="gather"))
        start, end = packed.data_ptr(), packed.data_ptr() + packed.numel() * 4
        strided, contiguous = (
            [getattr(batch, name).data for name in "qkv"] for batch, _ in batches
        )
        assert all(start <= pointer < end for pointer in strided)
        assert not any(start <= pointer < end for pointer in contiguous)  # the twin


def small():
    """Two sparse heads of 16 in tile order on a 13 x 17 grid."""
    layout = TokenLayout((13, 17), order="tile", tile=(4, 4), block_size=16)
    masks = HeadMasks(
        stack_heads([local_window(layout, 2), random_blocks(layout, 0.5, 1)], 1), layout=layout
    )
    generator = torch.Generator().manual_seed(3)
    return masks, *(torch.randn(1, 2, 221, 16, generator=generator) * 1.5 for _ in range(3))


class TestGradients:
    @settings(max_examples=250, deadline=None)
    @given(problem=problems(), seed=st.integers(0, 99))
    @pytest.mark.parametrize("capability", HERE)
    def test_equal_references(self, capability, problem, seed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
            got = differentiate(problem, "gather", seed)
        exact, eager = (
            differentiate(problem, "reference", seed, dtype)
            for dtype in (torch.float64, torch.float32)
        )
        near = differentiate(problem, "reference", seed, torch.float64, rounded)
        size = max(x.abs().max() for x in (*exact, *problem[1:4]))
        for tensors in zip(eager, got, exact, near, strict=True):
            assert_as_exact_as(*tensors, size)

    def test_twin_without_the_softmaxs_own_gradient(self, way):
        """The comparison above can fail: leaving out delta changes the gradient by far more than its tolerance."""
        masks, q, k, v = small()
        q.requires_grad_()
        out = bsa.sparse_attention(q, k, v, masks, backend="gather")
        grad = torch.randn(out.shape)
        (right,) = torch.autograd.grad(out, q, grad)
        problem = Problem(q, k, v, masks, 0.25)
        torch.testing.assert_close(gradients(problem, out, grad)[0], right)
        wrong = gradients(problem, torch.zeros_like(out), grad)[0]
        assert (right - wrong).abs().max() > 0.1

    def test_gradients_of_what_nobody_keeps_are_zero(self, way):
        q, k, v = (torch.randn(1, 1, 64, 8, requires_grad=True) for _ in range(3))
        base = torch.eye(4, dtype=torch.bool)[None, None].clone()
        base[0, 0, 2] = base[0, 0, 1]  # nobody sees block 2
        out = bsa.sparse_attention(q, k, v, HeadMasks(base, block_size=16), backend="gather")
        out.sum().backward()
        assert not k.grad[:, :, 32:48].any()
        assert not v.grad[:, :, 32:48].any()
        assert k.grad[:, :, 16:32].any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, way, dtype):
        masks, *exact = (x.to(dtype) if isinstance(x, torch.Tensor) else x for x in small())
        narrow, wide = (
            [x.clone().to(t).requires_grad_() for x in exact] for t in (dtype, torch.float32)
        )
        for tensors in (narrow, wide):
            bsa.sparse_attention(*tensors, masks, backend="gather").sum().backward()
        for a, b in zip(narrow, wide):
            assert a.grad.dtype == dtype
            assert (a.grad - b.grad).norm() < 2 * torch.finfo(dtype).eps * b.grad.norm()


def differentiate(problem, backend, seed, dtype=torch.float32, change=lambda x: x):
    masks, *tensors, rel_pos, scale = problem
    leaves = [change(x.to(dtype)).requires_grad_() for x in (*tensors, *(rel_pos or ()))]
    out = attend(
        (masks, *leaves[:3], bsa.RelPos(*leaves[3:]) if rel_pos else None, scale), backend, dtype
    ).out
    grad = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return torch.autograd.grad(out, leaves, change(grad.to(dtype)))


class TestRuns:
    @pytest.fixture(autouse=True)
    def two_threads(self):
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(1)

    def test_a_hundred_calls_from_eight_threads_equal_the_serial_ones(self, way):
        inputs = [[torch.randn(1, 2, 221, 16) for _ in range(3)] for _ in range(10)]
        masks = small()[0]

        def call(x):
            q, k, v = (y.clone().requires_grad_() for y in x)
            out = bsa.sparse_attention(q, k, v, masks, backend="gather")
            out.square().sum().backward()
            return out.detach(), q.grad, k.grad, v.grad

        serial, results = [call(x) for x in inputs], [None] * 104

        def work(thread):
            for i in range(thread, len(results), 8):
                results[i] = call(inputs[i % 10])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, result in enumerate(results):
            assert all(torch.equal(a, b) for a, b in zip(result, serial[i % 10]))

    def test_the_number_of_threads_changes_no_bit(self, way):
        masks, q, k, v = small()
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(bsa.sparse_attention(q, k, v, masks, backend="gather"))
        assert all(torch.equal(out, outs[0]) for out in outs)


class Built(TorchDispatchMode):
    """Counts integer tensors that are new memory, not views of what was there."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(out):
            if (
                isinstance(x, torch.Tensor)
                and not x.is_floating_point()
                and x.dtype != torch.bool  # which rows see nothing, found from logits
                and x.untyped_storage().data_ptr() not in given
            ):
                self.names.append(str(function))
        return out


@pytest.mark.parametrize("rel_pos", [False, True])
def test_a_warm_forward_builds_no_index_tensor(way, rel_pos):
    masks, q, k, v = small()
    terms = bsa.RelPos(torch.randn(1, 2, 221, 13), torch.randn(1, 2, 221, 17)) if rel_pos else None
    problem = Problem(q, k, v, masks, 0.25, rel_pos=terms)
    with Built() as cold:
        expected = attend_problem(problem, "gather").out
    with Built() as warm:
        out = attend_problem(problem, "gather").out
    assert warm.names == []
    assert cold.names  # the twin: making masks ready is seen
    assert torch.equal(out, expected)


def test_many_lengths_in_one_batch(way):
    """More tables of runs than the masks remember: those in use must outlive being forgotten."""
    lengths = [100 + 13 * i for i in range(45)]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, n, 16, generator=generator) for n in lengths]
    masks = [
        HeadMasks(
            torch.rand(1, 2, -(-n // 16), -(-n // 16), generator=generator) < 0.5,
            block_size=16,
            allow_empty_rows=True,
        )
        for n in lengths
    ]
    together = bsa.sparse_attention(images, images, images, masks, backend="gather")
    for out, image, hm in zip(together, images, masks, strict=True):
        alone = bsa.sparse_attention(image[None], image[None], image[None], hm, backend="gather")[0]
        torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(way, default):
    masks, *tensors = small()

    def gradients():
        leaves = [x.clone().requires_grad_() for x in tensors]
        bsa.sparse_attention(*leaves, masks, backend="gather").square().sum().backward()
        return [x.grad for x in leaves]

    expected = gradients()
    torch.set_default_dtype(default)
    try:
        got = gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_without_a_query(way, dtype):
    q, k = (torch.randn(1, 1, n, 8, dtype=dtype, requires_grad=True) for n in (0, 128))
    bsa.sparse_attention(q, k, k, HeadMasks(None, [0]), backend="gather").sum().backward()
    assert q.grad.shape == q.shape
    assert not k.grad.any()


def test_any_nan_is_nan(way):
    """A NaN may carry bits of its own."""
    masks, q, k, v = small()
    k.view(torch.int32)[0, 0, 3] = -1
    a, b = (
        bsa.sparse_attention(q, k, v, masks, backend=name).isnan() for name in ("gather", "sdpa")
    )
    assert a.any()
    assert torch.equal(a & b, a)


class TestWhyNot:
    def test_reasons(self):
        q = torch.randn(1, 2, 221, 16)
        masks = small()[0]
        plain = Problem(q, q, q, masks, 1.0)
        assert cpu_kernel.why_not(plain) is None
        assert "float32" in cpu_kernel.why_not(Problem(*(q.double(),) * 3, masks, 1.0))
        assert "causality" in cpu_kernel.why_not(Problem(q, q, q, masks, 1.0, is_causal=True))
        assert "dropout" in cpu_kernel.why_not(Problem(q, q, q, masks, 1.0, dropout_p=0.5))
        assert "on meta" in cpu_kernel.why_not(Problem(*(q.to("meta"),) * 3, masks, 1.0))

    def test_without_a_library_torch_serves(self, monkeypatch):
        masks, q, k, v = small()
        expected = bsa.sparse_attention(q, k, v, masks, backend="gather")
        cpu_kernel.library.cache_clear(), cpu_kernel.variant.cache_clear()
        monkeypatch.setattr(cpu_kernel.importlib.util, "find_spec", lambda name: None)
        try:
            assert "not built" in cpu_kernel.why_not()
            out = bsa.sparse_attention(q, k, v, masks, backend="gather")
        finally:
            cpu_kernel.library.cache_clear(), cpu_kernel.variant.cache_clear()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(out, expected)  # the twin: it was another way

    def test_switched_off(self, monkeypatch):
        cpu_kernel.library.cache_clear()
        monkeypatch.setenv("BSA_VISION_COMPILED", "0")
        try:
            assert "switched off by BSA_VISION_COMPILED=0" in cpu_kernel.library()
        finally:
            cpu_kernel.library.cache_clear()

    def test_a_library_of_another_version_is_refused(self, monkeypatch):
        """Python that was updated without building again must not hand pointers to a loop that reads them otherwise."""
        cpu_kernel.library.cache_clear()
        monkeypatch.setattr(cpu_kernel, "INTERFACE", cpu_kernel.INTERFACE + 1)
        try:
            assert "another version of its source: install bsa-vision again" in cpu_kernel.library()
        finally:
            cpu_kernel.library.cache_clear()

    def test_another_processor_is_named(self):
        assert "capability is DEFAULT" in cpu_kernel.variant("DEFAULT")

    def test_long_dense_calls_take_it(self):
        """`auto`: measured faster than torch's own attention from 1024 keys on with either variant."""
        from bsa_vision.attention.backends.select import choose

        dense = HeadMasks(None, [0, 0])
        for tokens, expected in ((1023, "sdpa"), (1024, "gather")):
            q = torch.empty(1, 2, tokens, 8)
            assert choose(Problem(q, q, q, dense, 1.0)) == expected


def test_the_table_of_runs_is_the_block_rows(way):
    masks = small()[0]
    table = masks.key_ranges(221, 221)
    rows = masks.block_rows(221, 221)[0]
    for head in range(2):
        for number, row in enumerate(rows[head]):
            assert (row.start, row.stop) == tuple(table.row_start[number : number + 2].tolist())
            first, last = table.row_ptr[0, head, number : number + 2].tolist()
            assert row.runs == tuple(map(tuple, table.ranges[first:last].tolist()))
    assert gather.why_not(Problem(*(torch.empty(1, 2, 221, 16),) * 3, masks, 1.0)) is None

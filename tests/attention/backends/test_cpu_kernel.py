"""The compiled loop of `gather` against `reference` in float64, for each instruction set."""

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

CAPABILITIES = []  # of this machine, the highest first
if cpu_kernel.why_not() is None:
    CAPABILITIES = list(VARIANTS)
    CAPABILITIES = CAPABILITIES[CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) :]
pytestmark = pytest.mark.skipif(not CAPABILITIES, reason=f"{cpu_kernel.why_not()}")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one torch thread: on a busy machine the threads of tiny problems wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[*CAPABILITIES, "torch"])
def implementation(request, monkeypatch):
    """Run `gather` with every compiled variant of this machine, and in torch."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_kernel, "why_not", lambda problem=None: "switched off")
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@st.composite
def problems(draw):
    """Draw (masks, q, k, v, rel_pos, scale) in float64 with wide logits and relative terms."""
    block = draw(st.sampled_from([3, 16, 40, 64, 128, 256]))
    order, tile = draw(st.sampled_from(["raster", "tile"])), (2, max(block // 3, 1))

    def layout(**tokens):
        grid = draw(st.integers(1, 14)), draw(st.integers(1, 23))
        return TokenLayout(grid, order=order, tile=tile, block_size=block, **tokens)

    q_layout = kv_layout = layout(num_prefix_tokens=draw(st.integers(0, 3)))
    if draw(st.booleans()):
        kv_layout = layout(num_suffix_tokens=draw(st.integers(0, 3)))
    images, groups, group = (draw(st.integers(1, 2)) for _ in range(3))
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

    def random(*shape):
        return 1.5 * torch.randn(images, *shape, generator=generator, dtype=torch.float64)

    dim, dim_v = (draw(st.sampled_from([1, 8, 32, 37, 64, 80, 256])) for _ in range(2))
    num_q, num_k = q_layout.num_tokens, kv_layout.num_tokens
    shapes = ((num_q, heads, dim), (num_k, groups, dim), (num_k, groups, dim_v))
    q, k, v = (random(*shape).transpose(1, 2) for shape in shapes)
    if draw(st.booleans()):
        q, k, v = (x.contiguous() for x in (q, k, v))
    rel_pos = None
    only_patches = kv_layout.num_prefix_tokens == kv_layout.num_suffix_tokens == 0
    if only_patches and draw(st.booleans()):  # relative position needs patches only
        rel_pos = bsa.RelPos(*(random(heads, num_q, side) for side in kv_layout.grid))
    return masks, q, k, v, rel_pos, draw(st.sampled_from([None, 0.3]))


def attend(problem, backend, dtype=torch.float32, **options):
    masks, q, k, v, rel_pos, scale = problem
    q, k, v = (x.to(dtype) for x in (q, k, v))
    rel_pos = None if rel_pos is None else bsa.RelPos(*(term.to(dtype) for term in rel_pos))
    return calls.attend(masks, q, k, v, rel_pos=rel_pos, scale=scale, backend=backend, **options)


ROUNDING = 2.0**-21  # a few times the rounding error of float32


def rounded(x):
    """Change every element of `x` by about one rounding error."""
    generator = torch.Generator().manual_seed(x.numel())
    return x * (1 + ROUNDING * torch.randn(x.shape, generator=generator, dtype=x.dtype))


def assert_as_exact_as(eager, result, expected, perturbed, size):
    """Assert that the error is at most a few times that of float32 arithmetic.

    eager      computed in float32
    perturbed  computed in float64 from rounded inputs; one draw may be lucky, hence the factor
    size       size of the summands: a sum that should be 0 is not exactly 0
    """
    off_eager, off_perturbed = ((x.double() - expected).abs().max() for x in (eager, perturbed))
    budget = off_eager + off_perturbed + ROUNDING * size
    assert (result.double() - expected).abs().max() <= 8 * budget


class TestForward:
    @settings(max_examples=250, deadline=None)
    @given(problem=problems())
    @pytest.mark.parametrize("capability", CAPABILITIES)
    def test_equals_reference(self, capability, problem):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
            out, lse, _ = attend(problem, "gather", return_lse=True)
        expected = attend(problem, "reference", torch.float64, return_lse=True)
        eager = attend(problem, "reference", return_lse=True)
        masks, q, k, v, rel_pos, scale = problem
        rel_pos = rel_pos and bsa.RelPos(*map(rounded, rel_pos))
        near = (masks, rounded(q), rounded(k), rounded(v), rel_pos, scale)
        perturbed = attend(near, "reference", torch.float64).out
        assert_as_exact_as(eager.out, out, expected.out, perturbed, v.abs().max())
        assert out.stride() == eager.out.stride()
        finite = expected.lse.isfinite()
        assert torch.equal(lse.isposinf(), expected.lse.isposinf())
        torch.testing.assert_close(lse[finite].double(), expected.lse[finite], rtol=1e-5, atol=1e-5)

    def test_the_selected_variant_runs(self, implementation, monkeypatch):
        """The comparisons of this file test the variants that they name."""
        called = []
        real = cpu_kernel.variant

        def spy(capability):
            called.append(capability)
            return real(capability)

        monkeypatch.setattr(cpu_kernel, "variant", spy)
        masks, q, k, v = small()
        with torch.no_grad():
            bsa.sparse_attention(q, k, v, masks, backend="gather")
        assert set(called) == ({implementation} if implementation != "torch" else set())

    @pytest.mark.parametrize("change", ["one block less", "another order", "no relative position"])
    def test_twin_a_wrong_result_differs(self, implementation, change):
        masks, q, k, v = small()
        rel_pos = bsa.RelPos(torch.randn(1, 2, 221, 13) * 2, torch.randn(1, 2, 221, 17) * 2)
        base = masks.base_blockmask.clone()
        if change == "one block less":
            base[0, 0, 3, 3] = False
        layout = masks.layout
        if change == "another order":
            layout = TokenLayout(layout.grid, block_size=16)
        terms = None if change == "no relative position" else rel_pos
        other = HeadMasks(base, layout=layout)
        a = bsa.sparse_attention(q, k, v, masks, rel_pos=rel_pos, backend="gather")
        b = bsa.sparse_attention(q, k, v, other, rel_pos=terms, backend="gather")
        assert (a - b).abs().max() > 1e-2

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_nan_reaches_the_queries_that_attend_to_it_only(self, implementation, name):
        tensors = {x: torch.randn(1, 1, 64, 8) for x in "qkv"}
        masks = HeadMasks(torch.eye(4, dtype=torch.bool)[None, None], block_size=16)
        tensors[name][0, 0, 20] = torch.nan
        out = bsa.sparse_attention(*tensors.values(), masks, backend="gather")
        token = torch.arange(64)
        seen = token == 20 if name == "q" else token // 16 == 1
        assert torch.equal(out[0, 0].isnan(), seen[:, None].expand(-1, 8))

    @pytest.mark.parametrize("size", [1e2, 1e5, 1e18])
    def test_huge_logits(self, implementation, size):
        masks, q, k, v = small()
        problem = (masks, q.double() * size, k.double(), v.double(), None, None)
        out, expected = attend(problem, "gather").out, attend(problem, "reference").out
        assert out.isfinite().all()
        # Rounding decides between near ties of huge logits; compare where float64 has one winner.
        exact = attend(problem, "reference", torch.float64).out
        clear = (expected.double() - exact).abs().amax(-1) < 1e-4
        assert clear.float().mean() > 0.5
        assert (out.double() - exact).abs().amax(-1)[clear].max() < 1e-2

    def test_infinite_logits_as_reference(self, implementation):
        masks, q, k, v = small()
        q[0, 0, 5] = torch.inf
        names = ("gather", "reference")
        a, b = (bsa.sparse_attention(q, k, v, masks, backend=name) for name in names)
        assert torch.equal(a.isnan(), b.isnan())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_is_computed_in_float32(self, implementation, dtype):
        masks, q, k, v = (x.to(dtype) if isinstance(x, torch.Tensor) else x for x in small())
        out = bsa.sparse_attention(q, k, v, masks, backend="gather")
        wide = bsa.sparse_attention(q.float(), k.float(), v.float(), masks, backend="gather")
        assert out.dtype == dtype
        assert torch.equal(out, wide.to(dtype))

    def test_strided_inputs_are_not_copied(self, monkeypatch):
        """Token-major projections, which models use, are read in place."""
        masks, q, k, v = small()
        packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)  # (B, N, 3, H, D)
        views = packed.permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        batches = []
        real = cpu_kernel._describe

        def spy(*args):
            batches.append(real(*args))
            return batches[-1]

        monkeypatch.setattr(cpu_kernel, "_describe", spy)
        with torch.no_grad():
            out = bsa.sparse_attention(*views, masks, backend="gather")
            assert torch.equal(out, bsa.sparse_attention(q, k, v, masks, backend="gather"))
        start, end = packed.data_ptr(), packed.data_ptr() + packed.numel() * 4
        strided, contiguous = ([getattr(x, name).data for name in "qkv"] for x, _ in batches)
        assert all(start <= pointer < end for pointer in strided)
        assert not any(start <= pointer < end for pointer in contiguous)  # the twin


def small():
    """Return (masks, q, k, v): two sparse heads of 16 in tile order on a 13 x 17 grid."""
    layout = TokenLayout((13, 17), order="tile", tile=(4, 4), block_size=16)
    base = stack_heads([local_window(layout, 2), random_blocks(layout, 0.5, 1)], 1)
    masks = HeadMasks(base, layout=layout)
    generator = torch.Generator().manual_seed(3)
    return masks, *(torch.randn(1, 2, 221, 16, generator=generator) * 1.5 for _ in range(3))


class TestGradients:
    @settings(max_examples=250, deadline=None)
    @given(problem=problems(), seed=st.integers(0, 99))
    @pytest.mark.parametrize("capability", CAPABILITIES)
    def test_equal_references(self, capability, problem, seed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
            got = differentiate(problem, "gather", seed)
        exact = differentiate(problem, "reference", seed, torch.float64)
        eager = differentiate(problem, "reference", seed, torch.float32)
        near = differentiate(problem, "reference", seed, torch.float64, rounded)
        size = max(x.abs().max() for x in (*exact, *problem[1:4]))
        for tensors in zip(eager, got, exact, near, strict=True):
            assert_as_exact_as(*tensors, size)

    def test_twin_without_delta(self, implementation):
        """The comparison can fail: omitting the delta of the softmax exceeds the tolerance."""
        masks, q, k, v = small()
        q.requires_grad_()
        out = bsa.sparse_attention(q, k, v, masks, backend="gather")
        grad = torch.randn(out.shape)
        (right,) = torch.autograd.grad(out, q, grad)
        problem = Problem(q, k, v, masks, 0.25)
        torch.testing.assert_close(gradients(problem, out, grad)[0], right)
        wrong = gradients(problem, torch.zeros_like(out), grad)[0]
        assert (right - wrong).abs().max() > 0.1

    def test_gradients_of_masked_keys_are_zero(self, implementation):
        q, k, v = (torch.randn(1, 1, 64, 8, requires_grad=True) for _ in range(3))
        base = torch.eye(4, dtype=torch.bool)[None, None].clone()
        base[0, 0, 2] = base[0, 0, 1]  # no query attends to block 2
        out = bsa.sparse_attention(q, k, v, HeadMasks(base, block_size=16), backend="gather")
        out.sum().backward()
        assert not k.grad[:, :, 32:48].any()
        assert not v.grad[:, :, 32:48].any()
        assert k.grad[:, :, 16:32].any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, implementation, dtype):
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
    terms = bsa.RelPos(*leaves[3:]) if rel_pos else None
    out = attend((masks, *leaves[:3], terms, scale), backend, dtype).out
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad(out, leaves, change(grad.to(dtype)))


class TestRuns:
    @pytest.fixture(autouse=True)
    def two_threads(self):
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(1)

    def test_a_hundred_calls_from_eight_threads_equal_the_serial_ones(self, implementation):
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

    def test_the_number_of_threads_changes_no_bit(self, implementation):
        masks, q, k, v = small()
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(bsa.sparse_attention(q, k, v, masks, backend="gather"))
        assert all(torch.equal(out, outs[0]) for out in outs)


class Built(TorchDispatchMode):
    """Record the operations that allocate integer tensors, other than views of their inputs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = {x.untyped_storage().data_ptr() for x in inputs}
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or x.is_floating_point():
                continue
            if x.dtype == torch.bool:  # empty rows, found from logits
                continue
            if x.untyped_storage().data_ptr() not in given:
                self.names.append(str(function))
        return out


@pytest.mark.parametrize("rel_pos", [False, True])
def test_a_warm_forward_builds_no_index_tensor(implementation, rel_pos):
    masks, q, k, v = small()
    terms = bsa.RelPos(torch.randn(1, 2, 221, 13), torch.randn(1, 2, 221, 17)) if rel_pos else None
    problem = Problem(q, k, v, masks, 0.25, rel_pos=terms)
    with Built() as cold:
        expected = attend_problem(problem, "gather").out
    with Built() as warm:
        out = attend_problem(problem, "gather").out
    assert warm.names == []
    assert cold.names  # the twin: preparing the masks is recorded
    assert torch.equal(out, expected)


def test_many_lengths_in_one_batch(implementation):
    """There are more tables of key ranges than the cache holds; those in use must stay alive."""
    lengths = [100 + 13 * i for i in range(45)]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, n, 16, generator=generator) for n in lengths]

    def random_masks(blocks):
        base = torch.rand(1, 2, blocks, blocks, generator=generator) < 0.5
        return HeadMasks(base, block_size=16, allow_empty_rows=True)

    masks = [random_masks(-(-n // 16)) for n in lengths]
    together = bsa.sparse_attention(images, images, images, masks, backend="gather")
    for out, image, hm in zip(together, images, masks, strict=True):
        alone = bsa.sparse_attention(image[None], image[None], image[None], hm, backend="gather")[0]
        torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(implementation, default):
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
def test_gradients_without_a_query(implementation, dtype):
    q, k = (torch.randn(1, 1, n, 8, dtype=dtype, requires_grad=True) for n in (0, 128))
    bsa.sparse_attention(q, k, k, HeadMasks(None, [0]), backend="gather").sum().backward()
    assert q.grad.shape == q.shape
    assert not k.grad.any()


def test_any_nan_is_nan(implementation):
    """NaN has many bit patterns."""
    masks, q, k, v = small()
    k.view(torch.int32)[0, 0, 3] = -1
    names = ("gather", "sdpa")
    a, b = (bsa.sparse_attention(q, k, v, masks, backend=name).isnan() for name in names)
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

    def test_without_a_library_gather_runs_in_torch(self, monkeypatch):
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
        assert not torch.equal(out, expected)  # the twin: another implementation ran

    def test_switched_off(self, monkeypatch):
        cpu_kernel.library.cache_clear()
        monkeypatch.setenv("BSA_VISION_COMPILED", "0")
        try:
            assert "switched off by BSA_VISION_COMPILED=0" in cpu_kernel.library()
        finally:
            cpu_kernel.library.cache_clear()

    def test_a_library_of_another_version_is_refused(self, monkeypatch):
        cpu_kernel.library.cache_clear()
        monkeypatch.setattr(cpu_kernel, "INTERFACE", cpu_kernel.INTERFACE + 1)
        try:
            assert "another version of bsa-vision: reinstall bsa-vision" in cpu_kernel.library()
        finally:
            cpu_kernel.library.cache_clear()

    def test_another_processor_is_named(self):
        assert "capability is DEFAULT" in cpu_kernel.variant("DEFAULT")

    def test_auto_uses_it_for_long_dense_calls(self):
        """From 1024 keys on the loop was measured to be faster than torch's attention."""
        from bsa_vision.attention.backends.select import choose

        dense = HeadMasks(None, [0, 0])
        for tokens, expected in ((1023, "sdpa"), (1024, "gather")):
            q = torch.empty(1, 2, tokens, 8)
            assert choose(Problem(q, q, q, dense, 1.0)) == expected


def test_key_ranges_equal_the_block_rows(implementation):
    masks = small()[0]
    table = masks.key_ranges(221, 221)
    rows = masks.block_rows(221, 221)[0]
    for head in range(2):
        for number, row in enumerate(rows[head]):
            assert (row.start, row.stop) == tuple(table.row_start[number : number + 2].tolist())
            first, last = table.row_ptr[0, head, number : number + 2].tolist()
            assert row.runs == tuple(map(tuple, table.ranges[first:last].tolist()))
    assert gather.why_not(Problem(*(torch.empty(1, 2, 221, 16),) * 3, masks, 1.0)) is None

"""Tests of the kernel backend, with a stand-in for the package (tests/helpers/fake_kernel.py)."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bsa_vision import HeadMasks, RelPos
from bsa_vision.attention.backends import gather, kernel, measured_costs, reference, self_test
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import choose
from bsa_vision.errors import BackendUnavailable
from tests.helpers import fake_kernel
from tests.helpers.problems import Varlen, varlens


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Make the stand-in importable under the real name."""
    modules = fake_kernel.make_modules()
    sys.modules.update(modules)
    kernel._probe.cache_clear()
    yield
    for name in modules:
        del sys.modules[name]
    kernel._probe.cache_clear()


def problem_of(varlen: Varlen, dtype: torch.dtype) -> Problem:
    q, k, v = (x.transpose(0, 1)[None].to(dtype) for x in (varlen.q, varlen.k, varlen.v))
    masks = HeadMasks(
        varlen.base_blockmask, varlen.head_mask_type, varlen.streaming_info, allow_empty_rows=True
    )
    return Problem(
        q,
        k,
        v,
        masks,
        varlen.scale or q.shape[-1] ** -0.5,
        cu_seqlens_q=varlen.cu_q,
        cu_seqlens_k=varlen.cu_k,
        max_seqlens=varlen.max_seqlens,
        is_causal=varlen.causal,
        exact_streaming=varlen.exact,
        return_lse=True,
    )


@settings(max_examples=40, deadline=None)
@given(varlens(max_tokens=180))
def test_ragged_problems(varlen):
    problem = problem_of(varlen, torch.bfloat16)
    out, lse, _ = kernel.run(problem)
    expected, expected_lse, _ = reference.run(problem)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected.float(), atol=0.05)
    assert torch.allclose(lse, expected_lse, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(varlens(max_tokens=150, exact=False))
def test_gradients(varlen):
    """The gradient uses the mask by columns, which the forward never reads."""
    grads = []
    for backend in (kernel, reference):
        problem = problem_of(varlen, torch.float16)
        leaves = [x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out = backend.run(replace(problem, **dict(zip("qkv", leaves)))).out
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        grads.append(torch.autograd.grad(out, leaves, grad))
    for found, expected in zip(*grads):
        tolerance = 0.02 * max(float(expected.abs().max()), 1)
        assert torch.allclose(found.float(), expected.float(), atol=tolerance)


def test_no_gradient_of_exact_streaming(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    exact = dict(is_causal=True, exact_streaming=True)
    assert why_not(**exact) is None
    assert why_not(requires_grad=True, **exact) == "the kernel has no gradient for exact streaming"
    problem = uniform([0, -1], 0, streaming_info=[0, 0, 3, 5])
    q = problem.q.clone().requires_grad_()
    out = kernel.run(replace(problem, q=q, **exact)).out
    message = "no gradient for exact streaming: use backend='reference'"
    with pytest.raises(BackendUnavailable, match=message):
        out.sum().backward()


def test_images_shorter_than_the_longest():
    """Blocks past the end of a short image do not displace its own blocks in the lists."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 712, 16, generator=generator).half() for _ in range(3))
    ends = torch.tensor([0, 512, 712], dtype=torch.int32)
    masks = HeadMasks(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    ragged = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlens=(512, 512))
    problem = Problem(q, k, v, masks, 0.25, **ragged, return_lse=True)
    converted = kernel._convert(problem, gradient=True)
    assert converted.rows[1, 0].tolist() == [[1, 0, -1, -1]] * 2 + [[-1] * 4] * 2
    assert torch.equal(converted.columns, converted.rows)
    out, lse, _ = kernel.run(problem)
    expected = reference.run(problem)
    assert torch.allclose(out.float(), expected.out.float(), atol=5e-3)
    assert torch.allclose(lse, expected.lse, atol=1e-3)
    assert lse[1, 0, 200:].isposinf().all()
    # The twin: with the lists of the longest image, a short image has no keys.
    too_long = converted.rows[:1].expand(2, -1, -1, -1).contiguous()
    streaming = (converted.types, converted.streaming)
    decoded = fake_kernel.decode(too_long, *streaming, (ends, ends), (512, 512))
    assert not decoded[1, ..., :2].any()


def test_masks_are_converted_once():
    """The kernel expects the blocks of each row in descending order."""
    problem = uniform([1, 0, 1], 2)
    first = kernel._converted(problem)
    assert kernel._converted(replace(problem, q=problem.q + 1)) is first
    kept = problem.masks.base_blockmask[0, 1, 0].nonzero().flatten().tolist()
    assert first.rows[0, 1, 0].tolist() == kept[::-1] + [-1] * (2 - len(kept))
    assert first.types.tolist() == [1, 0, 2]
    with Counted() as calls:
        kernel.run(problem)
    slow = {"aten.sort", "aten.argsort", "aten._local_scalar_dense", "aten.nonzero"}
    assert not slow & calls.names
    with Counted() as calls:  # the twin: the conversion sorts
        kernel._convert(problem, gradient=False)
    assert "aten.sort" in calls.names


class Counted(TorchDispatchMode):
    """Record the names of the operations outside the stand-in."""

    def __enter__(self):
        self.names, self.inside = set(), fake_kernel.forward_operator
        interface = sys.modules["block_sparse_attn.block_sparse_attn_interface"]
        interface._wrapped_block_sparse_attn_forward = self.hidden
        return super().__enter__()

    def __exit__(self, *error):
        interface = sys.modules["block_sparse_attn.block_sparse_attn_interface"]
        interface._wrapped_block_sparse_attn_forward = self.inside
        return super().__exit__(*error)

    def hidden(self, *arguments):
        with _disable_current_modes():
            return self.inside(*arguments)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(str(function).rpartition(".")[0])
        return function(*arguments, **(options or {}))


def uniform(
    head_mask_type, slices, dim=16, dtype=torch.float16, batch=2, mask_batch=1, **options
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, len(head_mask_type), 200, dim, generator=generator).to(dtype)
        for _ in range(3)
    )
    base = torch.rand(mask_batch, slices, 2, 2, generator=generator) < 0.6
    base = base | torch.eye(2, dtype=torch.bool) if slices else None
    return Problem(q, k, v, HeadMasks(base, head_mask_type, **options), dim**-0.5)


@pytest.mark.parametrize(
    ("head_mask_type", "slices"),
    [([1, 1, 1], 3), ([0, 1, 0], 1), ([1, 2, 2, 1], 2), ([2, 0, 3], 3), ([3, 1, 2], 3)],
)
def test_explicit_slices_are_expanded(head_mask_type, slices):
    assert_equals_reference(uniform(head_mask_type, slices))


def assert_equals_reference(problem, backend=kernel):
    out, expected = backend.run(problem).out, reference.run(problem).out
    assert out.shape == expected.shape
    assert torch.allclose(out.float(), expected.float(), atol=5e-3)


@pytest.mark.parametrize(("head_mask_type", "slices"), [([2, 0, 3], 3), ([3, 1, 2], 3)])
def test_twin_upstream_refuses_explicit_slices(head_mask_type, slices):
    with pytest.raises(AssertionError):
        raw_call(uniform(head_mask_type, slices), head_mask_type)


def test_twin_upstream_misreads_explicit_slices():
    """Two ones and two slices pass its check, but the last head gets slice 2 instead of 1."""
    problem = uniform([1, 2, 2, 1], 2)
    raw = raw_call(problem, [1, 2, 2, 1]).unflatten(0, (2, 200)).transpose(1, 2)
    difference = (raw.float() - reference.run(problem).out.float()).abs().amax((0, 2, 3))
    assert (difference[:3] < 5e-3).all()
    assert difference[3] > 0.1


def raw_call(problem: Problem, head_mask_type: list[int]) -> torch.Tensor:
    """Call the package's public function, as a user would."""
    q, k, v = (
        x.transpose(1, 2).flatten(0, 1).contiguous() for x in (problem.q, problem.k, problem.v)
    )
    cu = torch.tensor([0, 200, 400], dtype=torch.int32)
    types = torch.tensor(head_mask_type, dtype=torch.int32)
    base = problem.masks.base_blockmask.expand(2, -1, -1, -1)
    return fake_kernel.block_sparse_attn_func(q, k, v, cu, cu, types, None, base, 200, 200, 0.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 128))
def test_head_dims_are_padded_and_sliced(dim):
    assert_equals_reference(uniform([0, 1], 1, dim=dim))


def test_twin_the_pitfalls_are_real():
    """As upstream, the stand-in returns odd head dims too wide, and garbage from 129 on."""
    assert raw_call(uniform([0, 1], 1, dim=20), [0, 1]).shape[-1] == 24
    assert raw_call(uniform([0, 1], 1, dim=136), [0, 1]).isnan().all()


def test_masks_per_image_and_streaming():
    for problem in (
        uniform([1, 0, 1], 2, mask_batch=2),
        uniform([1, -1], 1, streaming_info=[0, 0, 1, 1]),
    ):
        assert_equals_reference(problem)


def why_not(
    dim=64,
    value_dim=None,
    dtype=torch.bfloat16,
    device="cuda",
    block_size=128,
    requires_grad=False,
    **fields,
) -> str | None:
    with FakeTensorMode():
        q = torch.empty(1, 2, 256, dim, dtype=dtype, device=device, requires_grad=requires_grad)
        v = torch.empty(1, 2, 256, value_dim or dim, dtype=dtype, device=device)
    blocks = -(-256 // block_size)
    masks = HeadMasks(torch.ones(1, 2, blocks, blocks, dtype=torch.bool), block_size=block_size)
    return kernel.why_not(Problem(q, q, v, masks, 1.0, **fields))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 136}, "head dim 136 > 128: the kernel would return uninitialised memory"),
        ({"dim": 256}, "head dim 256 > 128"),
        ({"value_dim": 160}, "head dim 160 > 128"),
        ({"dtype": torch.float32}, "takes float16 or bfloat16, got torch.float32"),
        ({"device": "cpu"}, "runs on CUDA, the tensors are on cpu"),
        ({"block_size": 64}, "blocks of 128 tokens, the masks have 64"),
        (
            {"rel_pos": RelPos(torch.empty(2, 64), torch.empty(2, 64))},
            "makes queries 192 wide, more than 128, and without a layout",
        ),
        ({"exact_streaming": True}, "exact streaming needs causal attention"),
    ],
)
def test_why_not(change, reason):
    assert reason in why_not(**change)


def test_compute_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer" in why_not()


def test_another_package_of_that_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    interface = sys.modules["block_sparse_attn.block_sparse_attn_interface"]
    monkeypatch.delattr(interface, "_wrapped_block_sparse_attn_backward")
    kernel._probe.cache_clear()
    try:
        missing = "has no _wrapped_block_sparse_attn_backward: it is not MIT HAN Lab's v0.0.2"
        assert missing in why_not()
    finally:
        kernel._probe.cache_clear()


def test_v_of_another_width():
    problem = uniform([0, 1], 1, dim=20)
    assert_equals_reference(replace(problem, v=problem.v[..., :13]))


def test_auto_prefers_the_kernel_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(measured_costs, "known", lambda what: {})
    monkeypatch.setattr(measured_costs, "describe", lambda *what: "a GPU")
    monkeypatch.setattr(self_test, "failure", lambda *call: None)
    with FakeTensorMode():
        q = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="cuda")
    base = torch.eye(2, dtype=torch.bool).expand(1, 2, -1, -1)
    assert choose(Problem(q, q, q, HeadMasks(base), 1.0)) == "kernel"
    assert choose(Problem(q, q, q, HeadMasks(None, [0, 0]), 1.0)) == "sdpa"


def broken(error):
    def find_spec(name, *_):
        if name == "block_sparse_attn":
            raise error

    return types.SimpleNamespace(find_spec=find_spec)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("libcudart.so.11"), "installed but broken: ImportError: libcudart.so.11"),
        (RuntimeError("CUDA version"), "installed but broken: RuntimeError: CUDA version"),
        (ModuleNotFoundError(name="block_sparse_attn_cuda"), "cannot be imported"),
        (ModuleNotFoundError(name="block_sparse_attn"), "not installed"),
    ],
)
def test_a_missing_or_broken_package_is_a_reason(monkeypatch, error, reason):
    for name in fake_kernel.make_modules():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [broken(error), *sys.meta_path])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel._probe.cache_clear()
    try:
        assert reason in why_not()
    finally:
        kernel._probe.cache_clear()


def test_gather_runs_what_the_kernel_cannot():
    problem = uniform([0, 1], 1, dim=136)
    assert gather.why_not(problem) is None
    assert_equals_reference(problem, gather)


def test_second_derivatives_are_refused():
    """torch treats the kernel's gradient as a constant, so they would silently be zero."""
    options = dict(dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (torch.randn(1, 1, 16, 32, **options) for _ in range(3))
    problem = Problem(q, k, v, HeadMasks(torch.ones(1, 1, 1, 1, dtype=torch.bool)), scale=0.2)
    (first,) = torch.autograd.grad(kernel.run(problem).out.square().sum(), q, create_graph=True)
    message = r"backend 'kernel' has no second derivatives.*use backend='reference'"
    with pytest.raises(RuntimeError, match=message):
        first.square().sum().backward()

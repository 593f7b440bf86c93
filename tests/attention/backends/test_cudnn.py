"""Tests of the cudnn backend, with a stand-in for the package (tests/helpers/fake_cudnn.py)."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import bsa_vision as bsa
from bsa_vision import HeadMasks, RelPos
from bsa_vision.attention.backends import cudnn, reference, self_test
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import choose
from bsa_vision.masks import TokenLayout, random_blocks, stack_heads
from tests.helpers import fake_cudnn


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Make the stand-in importable under the real names."""
    modules = fake_cudnn.make_modules()
    sys.modules.update(modules)
    cudnn._probe.cache_clear()
    yield
    for name in modules:
        del sys.modules[name]
    cudnn._probe.cache_clear()


def problem(
    heads=4,
    key_heads=None,
    tokens=(300, 300),
    dim=40,
    value_dim=None,
    dtype=torch.bfloat16,
    batch=2,
    mask_batch=1,
    empty=False,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (heads, tokens[0], dim),
        (key_heads or heads, tokens[1], dim),
        (key_heads or heads, tokens[1], value_dim or dim),
    )
    q, k, v = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
    blocks = [-(-count // 128) for count in tokens]
    base = torch.rand(mask_batch, heads - 1, *blocks, generator=generator) < 0.5
    if not empty:
        base[..., 0] = True
    masks = HeadMasks(base, [0, *[1] * (heads - 1)], allow_empty_rows=empty)
    return Problem(q, k, v, masks, dim**-0.5, return_lse=True)


@st.composite
def problems(draw):
    return problem(
        heads=draw(st.sampled_from([2, 4])),
        key_heads=draw(st.sampled_from([1, 2])),
        tokens=(draw(st.integers(1, 400)), draw(st.integers(1, 400))),
        dim=draw(st.integers(1, 128)),
        value_dim=draw(st.integers(1, 128)),
        dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
        mask_batch=draw(st.sampled_from([1, 2])),
        empty=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=60, deadline=None)
@given(problems())
def test_equals_reference(given_problem):
    found, expected = cudnn.run(given_problem), reference.run(given_problem)
    assert found.out.shape == expected.out.shape
    assert torch.allclose(found.out.float(), expected.out.float(), atol=0.03)
    assert torch.allclose(found.lse, expected.lse, atol=1e-3)


def test_twin_masks_matter():
    given_problem = problem()
    other = HeadMasks(~given_problem.masks.base_blockmask, [0, 1, 1, 1], allow_empty_rows=True)
    found = cudnn.run(replace(given_problem, masks=other)).out.float()
    assert not torch.allclose(found, reference.run(given_problem).out.float(), atol=0.1)


@pytest.mark.parametrize("dims", [(40, 40), (64, 30), (128, 128)])
def test_gradients(dims):
    grads = []
    for backend in (cudnn, reference):
        own = problem(dim=dims[0], value_dim=dims[1])
        leaves = [x.clone().requires_grad_() for x in (own.q, own.k, own.v)]
        out = backend.run(replace(own, **dict(zip("qkv", leaves)))).out
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        grads.append(torch.autograd.grad(out, leaves, grad))
    for found, expected in zip(*grads):
        assert torch.allclose(found.float(), expected.float(), atol=0.05)
        assert expected.abs().max() > 0.5


def test_rows_that_are_not_aligned():
    """Slices of fused projections: one of odd width, and one that can be read in place."""
    own = problem(dim=128)
    for offset, width in ((3, 131), (8, 136)):
        wide = [torch.zeros(*x.shape[:3], width, dtype=x.dtype) for x in (own.q, own.k, own.v)]
        parts = [x[..., offset : offset + 128] for x in wide]
        slices = [x.copy_(y) for x, y in zip(parts, (own.q, own.k, own.v))]
        moved = replace(own, **dict(zip("qkv", slices)))
        assert torch.equal(cudnn.run(moved).out, cudnn.run(own).out)
    assert cudnn._padded(slices[0], 128, 16).data_ptr() == slices[0].data_ptr()
    later = own.q.flatten().repeat(2)[64:]
    start = (-later.data_ptr() % 128) // 2 + 8  # 16 bytes past a multiple of 128
    later = later[start:][: own.q.numel()].view_as(own.q)
    assert cudnn._padded(later, 128, 16) is later
    moved = cudnn._padded(later, 128, 128)
    assert moved.data_ptr() != later.data_ptr()
    assert torch.equal(moved, later)


def test_lists_are_built_once():
    own = problem()
    lists = cudnn._lists(own)
    assert cudnn._lists(replace(own, q=own.q + 1)) is lists
    assert lists.sizes.tolist() == [128, 128, 300 - 256]
    assert lists.index.shape == (2, 4, 3, 3)
    kept = own.masks.base_blockmask[0, 0, 1].nonzero().flatten().tolist()
    assert lists.index[1, 1, 1, : len(kept)].tolist() == kept
    assert lists.counts[:, 1, 1].tolist() == [len(kept)] * 2


def test_relative_position_widens_q_and_k_only():
    """In the windows of SAM's ViT-B, 64 + 14 + 14 columns become 96, and v stays at 64."""
    layout, generator = TokenLayout((14, 14)), torch.Generator().manual_seed(0)

    def random(dim):
        return torch.randn(3, 2, 196, dim, generator=generator).bfloat16()

    q, k, v = (random(64) for _ in range(3))
    rel_pos = RelPos(*(1.5 * random(14) for _ in range(2)))
    base = stack_heads([random_blocks(layout, 0.4, seed=i) for i in range(2)], 1)
    masks = HeadMasks(base, layout=layout)
    coordinates = dict(key_row=torch.arange(196) // 14, key_column=torch.arange(196) % 14)
    own = Problem(q, k, v, masks, 0.125, rel_pos=rel_pos, **coordinates)
    widths = []
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules["cudnn.block_sparse_attention"]
        forward = module.block_sparse_attention_forward

        def record(*x, **options):
            widths.append((x[0].shape[-1], x[2].shape[-1]))
            return forward(*x, **options)

        patch.setattr(module, "block_sparse_attention_forward", record)
        found = cudnn.run(own).out.float()
    assert widths == [(96, 64)]
    assert torch.allclose(found, reference.run(own).out.float(), atol=0.06)
    without = reference.run(replace(own, rel_pos=None)).out.float()
    assert not torch.allclose(found, without, atol=0.5)


def why_not(
    dim=64,
    value_dim=None,
    dtype=torch.bfloat16,
    device="cuda",
    block_size=128,
    tokens=256,
    heads=2,
    key_heads=None,
    requires_grad=False,
    **fields,
):
    with FakeTensorMode():
        q = torch.empty(
            1, heads, tokens, dim, dtype=dtype, device=device, requires_grad=requires_grad
        )
        k = torch.empty(1, key_heads or heads, tokens, dim, dtype=dtype, device=device)
        v = torch.empty(1, key_heads or heads, tokens, value_dim or dim, dtype=dtype, device=device)
    blocks = -(-256 // block_size)
    base = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
    masks = HeadMasks(base, [0] * (heads - 1) + [1], block_size=block_size)
    return cudnn.why_not(Problem(q, k, v, masks, 1.0, **fields))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 136}, "take head dims up to 128, got 136 and 136"),
        ({"value_dim": 160}, "take head dims up to 128, got 64 and 160"),
        ({"dtype": torch.float32}, "take float16 or bfloat16, got torch.float32"),
        ({"device": "cpu"}, "run on CUDA, the tensors are on cpu"),
        ({"block_size": 64}, "blocks of 128 tokens, the masks have 64"),
        ({"is_causal": True}, "not causal"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"tokens": 0}, "there are no tokens"),
        ({"heads": 70000}, "take up to 65535 heads over all images, got 70000"),
        ({"requires_grad": True, "dtype": torch.float16}, "gradient takes bfloat16"),
        ({"requires_grad": True, "key_heads": 1}, "gradient needs as many key heads"),
        ({"cu_seqlens_q": torch.tensor([0, 256])}, "images of one size"),
    ],
)
def test_why_not(monkeypatch, change, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert reason in why_not(**change)


@pytest.mark.parametrize(
    ("capability", "training", "reason"),
    [
        ((9, 0), True, None),
        ((10, 0), True, None),
        ((11, 0), False, None),
        ((11, 0), True, "gradient needs compute capability 9.x, 10.0 or 10.3, this GPU has 11.0"),
        ((12, 0), False, None),
        ((12, 1), True, "gradient needs compute capability 9.x, 10.0 or 10.3, this GPU has 12.1"),
        ((8, 9), False, "compute capability 9.0 to 12.x, this GPU has 8.x"),
        ((13, 0), False, "compute capability 9.0 to 12.x, this GPU has 13.x"),
    ],
)
def test_gpus(monkeypatch, capability, training, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = why_not(requires_grad=training)
    assert found is None if reason is None else reason in found


def test_choosing_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(self_test, "failure", lambda *call: None)
    with FakeTensorMode():
        q = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="cuda")
    own = Problem(q, q, q, HeadMasks(torch.eye(2, dtype=torch.bool).expand(1, 2, -1, -1)), 1.0)
    assert choose(own, "cudnn") == "cudnn"
    message = "cannot run this call: cuDNN's kernels are not causal"
    with pytest.raises(bsa.BackendUnavailable, match=message):
        choose(replace(own, is_causal=True), "cudnn")


def test_empty_rows_are_found():
    """The part of a mask that a shorter call uses may have empty rows."""
    mask = torch.eye(4, dtype=torch.bool).flip(0).expand(1, 1, 4, 4)
    q = torch.randn(1, 1, 200, 64).bfloat16()
    assert cudnn._lists(Problem(q, q, q, HeadMasks(mask), 1.0)).some_are_empty
    assert not cudnn._lists(problem()).some_are_empty


def absent(error):
    def find_spec(name, *_):
        if name.partition(".")[0] == "cudnn":
            raise error

    return types.SimpleNamespace(find_spec=find_spec)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("no cudnn", name="cudnn"), "not installed, or older than 1.32"),
        (ModuleNotFoundError("no cuda", name="cuda"), "cannot be imported: no cuda"),
        (ImportError("requires the 'cuda' module"), "installed but broken: ImportError: requires"),
    ],
)
def test_a_missing_or_broken_package_is_a_reason(monkeypatch, error, reason):
    for name in fake_cudnn.make_modules():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [absent(error), *sys.meta_path])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cudnn._probe.cache_clear()
    try:
        assert reason in why_not()
    finally:
        cudnn._probe.cache_clear()


def test_second_derivatives_are_refused():
    """torch treats cuDNN's gradient as a constant, so they would silently be zero."""
    given = problem(heads=1, tokens=(20, 20), batch=1)
    leaves = [x.detach().requires_grad_() for x in (given.q, given.k, given.v)]
    q, k, v = leaves
    out = cudnn.run(replace(given, q=q, k=k, v=v)).out
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    message = r"backend 'cudnn' has no second derivatives.*use backend='reference'"
    with pytest.raises(RuntimeError, match=message):
        first.square().sum().backward()

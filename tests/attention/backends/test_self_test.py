"""Self-tests of GPU backends: stand-ins and eager FlexAttention pass, wrong backends fail."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import bsa_vision as bsa
from bsa_vision import HeadMasks
from bsa_vision.attention.backends import cudnn, flex, kernel, reference, self_test
from bsa_vision.attention.backends.problem import Problem, Result
from bsa_vision.attention.backends.select import choose, reasons
from tests.helpers import fake_cudnn, fake_kernel

FAILED = "it failed its self-test on this machine"


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Make all three backends available, with stand-ins for the packages."""
    from torch.nn.attention import flex_attention

    for name, module in {**fake_kernel.make_modules(), **fake_cudnn.make_modules()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    for backend in (kernel, cudnn, flex):
        monkeypatch.setattr(backend, "why_not", lambda problem: None)
    for backend in (kernel, cudnn):
        backend._probe.cache_clear()
    clear = self_test.failure.cache_clear
    clear()
    yield
    clear()
    for backend in (kernel, cudnn):
        backend._probe.cache_clear()


def failure(backend, dtype=torch.bfloat16, dims=(64, 64), grid=None, gradient=False):
    kind = self_test.CallKind(dtype, torch.device("cpu"), dims, grid, gradient)
    return self_test.failure(backend, reference, kind)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("dims", "grid"),
    [((64, 64), None), ((80, 128), None), ((64, 64), (14, 14)), ((80, 80), (24, 20))],
    ids=str,
)
@pytest.mark.parametrize("backend", [kernel, cudnn, flex])
def test_right_results_pass(backend, dims, grid, gradient):
    with torch.inference_mode(), torch.autocast("cpu"):  # must not reach the self-test
        assert failure(backend, dims=dims, grid=grid, gradient=gradient) is None


def test_large_grids_and_tiny_ones():
    """Terms are as wide as those of the call; keys fill a corner of a large grid."""
    for grid in ((64, 64), (1, 1), (3, 200)):
        assert failure(flex, grid=grid) is None


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_a_head_dim_too_large_for_the_gpu_is_found(monkeypatch, dims):
    """A test at another head dim would not find it."""
    run = flex.run

    def out_of_resources(problem):
        if problem.q.shape[-1] > 64:
            raise RuntimeError("out of resource: shared memory")
        return run(problem)

    monkeypatch.setattr(flex, "run", out_of_resources)
    found = failure(flex, dims=dims)
    assert found is None if dims == (64, 64) else "out of resource" in found


def test_kinds():
    q = torch.zeros(1, 2, 8, 16)
    masks = HeadMasks(None, [0, 0])
    plain = self_test.CallKind(torch.float32, torch.device("cpu"), (16, 16), None, gradient=False)
    assert self_test.CallKind.of(Problem(q, q, q, masks, 1.0)) == plain
    terms = bsa.RelPos(q[..., :2], q[..., :4].clone().requires_grad_())
    asked = Problem(q, q, q, masks, 1.0, rel_pos=terms)
    assert self_test.CallKind.of(asked) == replace(plain, grid=(2, 4), gradient=True)
    with torch.no_grad():
        assert self_test.CallKind.of(asked) == replace(plain, grid=(2, 4))


@pytest.mark.parametrize("backend", [kernel, cudnn, flex])
def test_a_lost_block_is_found(monkeypatch, backend):
    run = backend.run

    def wrong(problem):
        masks = problem.masks
        base = masks.base_blockmask.clone()
        base[0, 0, 1, 1] = ~base[0, 0, 1, 1]
        return run(replace(problem, masks=HeadMasks(base, masks.slices, layout=masks.layout)))

    monkeypatch.setattr(backend, "run", wrong)
    assert failure(backend).startswith(f"{FAILED}: output differs by ")


def test_a_wrong_gradient_is_found(monkeypatch):
    def wrong(problem):
        return Result(reference.run(problem).out + 0.5 * (problem.v - problem.v.detach()))

    monkeypatch.setattr(flex, "run", wrong)
    assert failure(flex, gradient=True).startswith(f"{FAILED}: dv differs by ")
    assert failure(flex) is None


def test_nan_is_wrong(monkeypatch):
    def wrong(problem):
        return Result(reference.run(problem).out * torch.nan)

    monkeypatch.setattr(flex, "run", wrong)
    assert failure(flex) == f"{FAILED}: output differs by nan"


def test_an_exception_is_a_failure(monkeypatch):
    def explode(problem):
        raise RuntimeError("PTX of another driver")

    monkeypatch.setattr(flex, "run", explode)
    assert failure(flex) == f"{FAILED}: RuntimeError: PTX of another driver"


def test_backends_that_fail_are_not_chosen(monkeypatch):
    tested = []

    def failure(backend, *_):
        tested.append(backend)
        return "no good" if backend is kernel else None

    monkeypatch.setattr(self_test, "failure", failure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with FakeTensorMode():
        q = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="cuda")
    own = Problem(q, q, q, HeadMasks(torch.eye(2, dtype=torch.bool).expand(1, 2, -1, -1)), 1.0)
    assert choose(own) == "cudnn"
    assert reasons(own)["kernel"] == "no good"
    with pytest.raises(bsa.BackendUnavailable, match="'kernel' cannot run this call: no good"):
        choose(own, "kernel")
    tested.clear()
    q = torch.zeros(1, 2, 256, 64)
    choose(Problem(q, q, q, own.masks, 1.0), "reference")
    assert tested == []  # no self-tests on a CPU

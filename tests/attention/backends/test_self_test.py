"""Backends for GPUs on trial: stand-ins and FlexAttention's un-compiled form pass, what is off or breaks does not."""

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


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """All three say they can; packages are stand-ins."""
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
    return self_test.failure(
        backend, reference, self_test.CallKind(dtype, torch.device("cpu"), dims, grid, gradient)
    )


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("dims", "grid"),
    [((64, 64), None), ((80, 128), None), ((64, 64), (14, 14)), ((80, 80), (24, 20))],
    ids=str,
)
@pytest.mark.parametrize("backend", [kernel, cudnn, flex])
def test_right_results_pass(backend, dims, grid, gradient):
    with torch.inference_mode(), torch.autocast("cpu"):  # whatever the caller is in
        assert failure(backend, dims=dims, grid=grid, gradient=gradient) is None


def test_large_grids_and_tiny_ones():
    """As wide as the call's own, on a corner of its keys."""
    for grid in ((64, 64), (1, 1), (3, 200)):
        assert failure(flex, grid=grid) is None


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_what_is_too_wide_for_this_gpu_is_seen(monkeypatch, dims):
    """Of which the same call at another width says nothing."""
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
def test_a_lost_block_is_seen(monkeypatch, backend):
    run = backend.run

    def off(problem):
        masks = problem.masks
        base = masks.base_blockmask.clone()
        base[0, 0, 1, 1] = ~base[0, 0, 1, 1]
        return run(
            Problem(
                problem.q,
                problem.k,
                problem.v,
                HeadMasks(base, masks.slices, layout=masks.layout),
                problem.scale,
            )
        )

    monkeypatch.setattr(backend, "run", off)
    assert "gave wrong results here: off is output by" in failure(backend)


def test_a_wrong_gradient_is_seen(monkeypatch):
    run = reference.run
    monkeypatch.setattr(
        flex,
        "run",
        lambda problem: Result(run(problem).out * 1.0 + 0.5 * (problem.v - problem.v.detach())),
    )
    assert "wrong results here: off is dv by" in failure(flex, gradient=True)
    assert failure(flex) is None


def test_nan_is_wrong(monkeypatch):
    run = reference.run
    monkeypatch.setattr(flex, "run", lambda problem: Result(run(problem).out * torch.nan))
    assert "off is output by nan" in failure(flex)


def test_what_breaks_is_not_taken(monkeypatch):
    def explode(problem):
        raise RuntimeError("PTX of another driver")

    monkeypatch.setattr(flex, "run", explode)
    assert failure(flex) == "a small call with it failed here: RuntimeError: PTX of another driver"


def test_choosing_goes_by_it(monkeypatch):
    tried = []
    monkeypatch.setattr(
        self_test,
        "failure",
        lambda backend, *rest: tried.append(backend) or ("no good" if backend is kernel else None),
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with FakeTensorMode():
        q = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="cuda")
    own = Problem(q, q, q, HeadMasks(torch.eye(2, dtype=torch.bool).expand(1, 2, -1, -1)), 1.0)
    assert choose(own) == "cudnn"
    assert reasons(own)["kernel"] == "no good"
    with pytest.raises(bsa.BackendUnavailable, match="'kernel' cannot run this call: no good"):
        choose(own, "kernel")
    tried.clear()
    q = torch.zeros(1, 2, 256, 64)
    choose(Problem(q, q, q, own.masks, 1.0), "reference")
    assert tried == []  # on a CPU nothing is on trial

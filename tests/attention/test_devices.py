"""Tensors on other devices and AMD GPUs, nested tensors, and second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import bsa_vision as bsa
from bsa_vision import HeadMasks, sparse_attention
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import choose, reasons
from bsa_vision.measure.latency import describe

FOR_NVIDIA = ("kernel", "cudnn", "flex")


def masks():
    """Masks of 257 tokens: each block attends to itself and to the first."""
    blocks = torch.eye(3, dtype=torch.bool)
    blocks[:, 0] = True
    return HeadMasks(blocks.expand(1, 4, 3, 3))


def problem(device, masks):
    q = torch.randn(1, 4, 257, 64, device=device, dtype=torch.bfloat16)
    return Problem(q, q, q, masks, scale=1.0)


class TestOtherDevices:
    """Fake tensors stand for the devices."""

    @pytest.mark.parametrize("device", ["mps", "xpu"])
    def test_gather_or_sdpa(self, device):
        real = masks()
        with FakeTensorMode(allow_non_fake_inputs=True):
            call = problem(device, real)
            why = reasons(call)
            assert choose(call) == "gather"
            assert sparse_attention(call.q, call.q, call.q, call.masks).device.type == device
            with pytest.raises(
                bsa.BackendUnavailable,
                match=f"on {device}. Backends that can: gather, sdpa, reference",
            ):
                choose(call, "kernel")
        assert {name: reason is None for name, reason in why.items()} == {
            name: name not in FOR_NVIDIA for name in why
        }
        for name in FOR_NVIDIA:
            assert why[name].endswith(f"the tensors are on {device}")

    def test_rocm(self, monkeypatch):
        """AMD GPUs, whose device type in torch is "cuda" as well."""
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
        real = masks()
        with FakeTensorMode(allow_non_fake_inputs=True):
            call = problem("cuda", real)
            why = reasons(call)
            assert choose(call) == "gather"
            assert sparse_attention(call.q, call.q, call.q, call.masks).device.type == "cuda"
        for name in FOR_NVIDIA:
            assert why[name].endswith("this torch is built for ROCm")
        assert [name for name in why if why[name] is None] == ["gather", "sdpa", "reference"]

    def test_meta(self):
        q = torch.empty(1, 4, 257, 64, device="meta", requires_grad=True)
        for backend in ("auto", "gather", "sdpa", "reference"):
            out = sparse_attention(q, q, q, masks(), backend=backend)
            assert (out.shape, out.device.type) == (q.shape, "meta")

    def test_latency_models_differ_by_device(self):
        known = [
            describe(64, torch.float32, torch.device(device)) for device in ("cpu", "mps", "xpu")
        ]
        assert len(set(known)) == 3


class TestNested:
    def test_nested_tensors_are_refused(self):
        images = [torch.randn(77, 4, 8), torch.randn(257, 4, 8)]
        q = torch.nested.nested_tensor(images, layout=torch.jagged)
        with pytest.raises(
            TypeError,
            match=r"q is a nested tensor: expected \(B, H, N, D\).*q\.unbind\(\).*bsa\.pack",
        ):
            sparse_attention(q.transpose(1, 2), q.transpose(1, 2), q.transpose(1, 2), masks())
        bounds = torch.tensor([0, 77, 334], dtype=torch.int32)
        types = torch.zeros(4, dtype=torch.int32)
        with pytest.raises(
            TypeError, match=r"q is a nested tensor: expected \(total, H, D\).*bsa\.pack"
        ):
            bsa.block_sparse_attn_func(q, q, q, bounds, bounds, types, None, None, 257, 257, 0.0)
        assert "q is a nested tensor" in str(
            bsa.check(q.transpose(1, 2), q.transpose(1, 2), masks())
        )

    def test_the_advice_of_the_error_works(self):
        images = [torch.randn(4, n, 8) for n in (40, 100)]
        nested = torch.nested.nested_tensor(
            [x.transpose(0, 1) for x in images], layout=torch.jagged
        )
        q = nested.transpose(1, 2)
        each = [
            HeadMasks(torch.eye(-(-n // 32), dtype=torch.bool).expand(1, 4, -1, -1), block_size=32)
            for n in (40, 100)
        ]
        lists = [list(q.unbind())] * 3
        for out, image, hm in zip(sparse_attention(*lists, each), images, each, strict=True):
            torch.testing.assert_close(out, sparse_attention(*[image[None]] * 3, hm)[0])
        assert bsa.pack(list(q.unbind())).cu_seqlens.tolist() == [0, 40, 140]


class TestSecondDerivatives:
    def norm_of_the_gradient(self, backend, masks):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, 4, 257, 16, generator=generator, requires_grad=True) for _ in range(3)
        )
        out = sparse_attention(q, k, v, masks, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), k)[0]

    @pytest.mark.parametrize("backend", ["auto", "gather"])
    def test_the_error_names_a_backend_that_has_them(self, backend):
        with pytest.raises(
            RuntimeError,
            match=r"backend 'gather' has no second derivatives.*use backend='reference'",
        ):
            self.norm_of_the_gradient(backend, masks())

    def test_reference_has_second_derivatives(self):
        torch.testing.assert_close(
            self.norm_of_the_gradient("reference", masks()),
            self.norm_of_the_gradient("sdpa", masks()),
            rtol=1e-3,
            atol=1e-3,
        )

    def test_first_derivatives_that_keep_their_graph(self):
        q = torch.randn(1, 4, 257, 16, requires_grad=True)
        grads = [
            torch.autograd.grad(
                sparse_attention(q, q, q, masks()).square().sum(), q, create_graph=create
            )[0]
            for create in (True, False)
        ]
        assert torch.equal(*grads)

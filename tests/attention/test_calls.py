"""Calls that are refused: what the messages say, and that nothing else is computed instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import bsa_vision as bsa
from bsa_vision import masks
from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.attention.functional import attend_masks
from tests.attention.test_functional import qkv, small_problem

BAD_CALLS = {
    "rank": (
        lambda q, k, v, hm: (q[0], k, v, hm),
        ValueError,
        r"q \(3, 46, 8\).*expected \(B, H, N, D\) for each",
    ),
    "head dim": (
        lambda q, k, v, hm: (q[..., :4], k, v, hm),
        ValueError,
        r"q \(1, 3, 46, 4\).*the same head dim",
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
        r"q has 45 tokens, the layout of the HeadMasks 46 "
        r"\(1 prefix \+ 5 x 9 patches \+ 0 suffix\).*make the masks",
    ),
    "blocks": (
        lambda q, k, v, hm: (
            q,
            k,
            v,
            bsa.HeadMasks(torch.ones(1, 3, 2, 2, dtype=torch.bool), block_size=4),
        ),
        ValueError,
        r"q has 46 tokens in 12 blocks of 4, base_blockmask has shape \(1, 3, 2, 2\).*"
        r"make the mask",
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


def test_named_backends_never_fall_back():
    hm, q, k, v = small_problem()
    with pytest.raises(
        bsa.BackendUnavailable,
        match=r"'kernel' cannot run this call: .* Backends that can: gather, sdpa, reference",
    ):
        bsa.sparse_attention(q, k, v, hm, backend="kernel")
    with pytest.raises(
        ValueError,
        match=r"backend='fast': allowed are 'auto', 'kernel', 'cudnn', 'flex', 'gather', "
        r"'sdpa', 'reference'",
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
    """The operator has no forward-mode derivative, and torch would treat it as a constant."""

    def function(self, backend):
        q = qkv(1, 2, 16, 8)[0].detach()
        hm = bsa.HeadMasks(None, [0, 0])
        return lambda scale: (
            bsa.sparse_attention(q * scale, q, q, hm, backend=backend).square().sum()
        )

    def test_is_refused_and_not_zero(self):
        one = torch.ones((), dtype=torch.float64)
        with pytest.raises(
            RuntimeError,
            match=r"'gather' does not support forward-mode differentiation \(jvp\).*"
            r"backend='reference'",
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


def test_rel_pos_without_a_layout_is_refused_by_attend_masks_as_well():
    """The compiled loop would read the positions of keys through a null pointer."""
    q = torch.randn(1, 2, 16, 8)
    term = torch.randn(1, 2, 16, 4)
    hm, rel_pos = bsa.HeadMasks(None, [0, 0]), bsa.RelPos(term, term)
    with pytest.raises(ValueError, match="rel_pos needs the patch of each key"):
        attend_masks(hm, q, q, q, rel_pos=rel_pos, backend="gather")

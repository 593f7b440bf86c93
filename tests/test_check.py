from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import bsa_vision as bsa
from masks import TokenLayout, generate_vit_random_sparse_mask

TOKENS = 2048


def good():
    q = torch.empty(1, 4, TOKENS, 64)
    return q, q, generate_vit_random_sparse_mask((512, 1024), 16, 128, 1, 4, include_cls_token=False)


def packed(**changes):
    x = torch.empty(2 * TOKENS, 4, 64)
    cu = torch.tensor([0, TOKENS, 2 * TOKENS], dtype=torch.int32)
    return x, x, good()[2], {"cu_seqlens_q": cu, "cu_seqlens_k": cu, **changes}


def test_a_good_call_has_no_finding():
    q, k, mask = good()
    for masks in (mask, bsa.HeadMasks(mask)):
        report = bsa.check(q, k, masks)
        assert report.ok
        assert str(report) == "nothing wrong found, and blocks to skip"
    q, k, mask, options = packed()
    assert bsa.check(q, k, mask, **options).ok


BAD = {
    "missing boundaries": (
        dict(cu_seqlens_q=None),
        "cu_seqlens_q is None: without (batch + 1,) boundaries every image",
    ),
    "boundaries without 0": (dict(cu_seqlens_q=torch.tensor([TOKENS, 2 * TOKENS], dtype=torch.int32)), "start at 0"),
    "boundaries int64": (dict(cu_seqlens_k=torch.tensor([0, TOKENS, 2 * TOKENS])), "torch.int64: expected torch.int32"),
    "boundaries too short": (dict(cu_seqlens_k=torch.tensor([0, TOKENS], dtype=torch.int32)), f"end at {2 * TOKENS}"),
    "boundaries of no sequence": (
        dict(cu_seqlens_q=torch.tensor([0], dtype=torch.int32)),
        "without (batch + 1,) boundaries",
    ),
    "longest": (dict(max_seqlen_q=100), "max_seqlen_q_=100 is less than the longest"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_boundaries(name):
    changes, message = BAD[name]
    q, k, mask, options = packed()
    report = bsa.check(q, k, mask, **{**options, **changes})
    assert "boundaries" in report.topics
    assert message in str(report)


def test_wrong_masks():
    q, k, mask = good()
    for wrong, message in (
        (mask[:, :3], "q has 4 heads, the HeadMasks 3"),
        (mask[..., :-1], "k has 2048 tokens in 16 blocks of 128, base_blockmask has shape (1, 4, 16, 15)"),
        (mask.float(), "dtype torch.float32: expected torch.bool"),
        (mask.repeat(3, 1, 1, 1), "q has 1 images, base_blockmask 3"),
        (mask & False, "keeps no key block"),
    ):
        report = bsa.check(q, k, wrong)
        assert report.topics[0] == "mask"
        assert report.findings[0].level == "error"
        assert message in str(report)


def test_what_the_call_would_refuse_is_found_before_it():
    q, k, mask = good()
    layout = TokenLayout((32, 64))
    other = TokenLayout((31, 66))  # as many blocks, other tokens
    assert bsa.check(q, k, bsa.HeadMasks(mask, layout=layout)).ok
    assert "q has 2048 tokens, the layout of the HeadMasks 2046" in str(
        bsa.check(q, k, bsa.HeadMasks(mask, layout=other))
    )
    assert bsa.check(q, k[..., :32], mask).topics[0] == "tensors"
    assert bsa.check(q, k.repeat(2, 1, 1, 1), mask).topics[0] == "tensors"
    q, k, mask, options = packed()
    assert "expected (2, S, 16, 16)" in str(bsa.check(q, k, mask.repeat(3, 1, 1, 1), **options))
    one = {**options, "cu_seqlens_k": torch.tensor([0, 2 * TOKENS], dtype=torch.int32)}
    assert not bsa.check(q, k, mask, **one).ok
    with pytest.raises(TypeError, match=r"q is a list, k a Tensor: expected tensors"):
        bsa.check([1.0], k, mask)


def test_nothing_to_gain():
    q, k, mask = good()
    report = bsa.check(q, k, mask | True)
    assert report.topics == ("all-true", "little-sparsity")
    assert not report.ok
    small = torch.empty(1, 4, 256, 64)
    assert "few-tokens" in bsa.check(small, small, mask[..., :2, :2] | torch.eye(2, dtype=torch.bool)).topics
    mask[0, 1] = True
    assert "every block of heads [1] is True" in str(bsa.check(q, k, mask))
    dense = bsa.HeadMasks(None, [0] * 4)
    assert "0% of the blocks are skipped" in str(bsa.check(q, k, dense))


def test_float32_and_wide_heads_on_cuda():
    mask = good()[2]
    with FakeTensorMode():
        wide = torch.empty(1, 4, TOKENS, 192, device="cuda")
        half = torch.empty(1, 4, TOKENS, 64, device="cuda", dtype=torch.bfloat16)
    assert bsa.check(wide, wide, mask).topics == ("dtype", "head-dim")
    assert "q is torch.float32 on CUDA" in str(bsa.check(wide, wide, mask))
    assert bsa.check(half, half, mask).ok

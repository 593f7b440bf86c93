from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import bsa_vision as bsa
from bsa_vision.masks import (
    Pattern,
    TokenLayout,
    generate_vit_random_sparse_mask,
    local_window,
    stack_heads,
)

TOKENS = 2048


def good():
    q = torch.empty(1, 4, TOKENS, 64)
    mask = generate_vit_random_sparse_mask((512, 1024), 16, 128, 1, 4, include_cls_token=False)
    return q, q, mask


def packed(**changes):
    x = torch.empty(2 * TOKENS, 4, 64)
    cu = torch.tensor([0, TOKENS, 2 * TOKENS], dtype=torch.int32)
    return x, x, good()[2], {"cu_seqlens_q": cu, "cu_seqlens_k": cu, **changes}


def test_a_good_call_has_no_finding():
    q, k, mask = good()
    for masks in (mask, bsa.HeadMasks(mask)):
        report = bsa.check(q, k, masks)
        assert report.ok
        assert str(report) == "ok: no problems found, blocks will be skipped"
    q, k, mask, options = packed()
    assert bsa.check(q, k, mask, **options).ok


BAD = {
    "missing boundaries": (
        dict(cu_seqlens_q=None),
        "cu_seqlens_q is None: without (batch + 1,) boundaries every image",
    ),
    "boundaries without 0": (
        dict(cu_seqlens_q=torch.tensor([TOKENS, 2 * TOKENS], dtype=torch.int32)),
        "start at 0",
    ),
    "boundaries int64": (
        dict(cu_seqlens_k=torch.tensor([0, TOKENS, 2 * TOKENS])),
        "torch.int64: expected torch.int32",
    ),
    "boundaries too short": (
        dict(cu_seqlens_k=torch.tensor([0, TOKENS], dtype=torch.int32)),
        f"end at {2 * TOKENS}",
    ),
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
        (
            mask[..., :-1],
            "k has 2048 tokens in 16 blocks of 128, base_blockmask has shape (1, 4, 16, 15)",
        ),
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
    small_mask = mask[..., :2, :2] | torch.eye(2, dtype=torch.bool)
    assert "few-tokens" in bsa.check(small, small, small_mask).topics
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


TILES = TokenLayout((32, 64), order="tile")


class TestOrder:
    """Comparison of the order of the masks with the order of the tokens."""

    def blocks(self, layout=TILES):
        return stack_heads([local_window(layout, 4)] * 4, 1)

    def test_a_forgotten_layout_is_named(self):
        q, k, _ = good()
        report = bsa.check(q, k, bsa.HeadMasks(self.blocks()))
        assert (report.topics, report.findings[0].level, report.ok) == (("order",), "error", False)
        assert "order='tile'" in str(report)
        assert "but tokens are used in the order given" in str(report)
        assert "ok: no problems" not in str(report)

    @pytest.mark.parametrize("right", ["given", "in one call", "raster", "a plan's"])
    def test_twin_with_the_layout(self, right):
        q, k, _ = good()
        spec = bsa.ModelSpec("vit", (bsa.LayerSpec("blocks.0", 0, 4, 64),), (32, 64), (16, 16))
        made = {
            "given": lambda: bsa.HeadMasks(self.blocks(), layout=TILES),
            "in one call": lambda: bsa.HeadMasks.from_patterns(TILES, "axial", heads=4),
            "raster": lambda: bsa.HeadMasks(self.blocks(TokenLayout((32, 64)))),
            "a plan's": lambda: bsa.SparsityPlan.uniform(spec, "axial").compile("self.0", TILES),
        }
        assert bsa.check(q, k, made[right]()).findings == ()

    def test_another_layout_than_the_masks(self):
        """Tiles that are rows of the grid are raster order: no finding."""
        q, k, mask = good()
        assert "made for TokenLayout(grid=(32, 64)" in str(
            bsa.check(q, k, bsa.HeadMasks(mask, layout=TILES))
        )
        rows = TokenLayout((32, 64), order="tile", tile=(1, 64))
        assert bsa.check(q, k, bsa.HeadMasks(mask, layout=rows)).ok

    def test_what_is_not_known_is_a_note(self):
        q, k, _ = good()
        report = bsa.check(q, k, bsa.HeadMasks(self.blocks().clone()))
        assert (report.topics, report.findings[0].level, report.ok) == (("order",), "note", True)
        summary, note = str(report).split("\n")
        assert summary == "ok: no problems found, blocks will be skipped"
        assert note.startswith("[note] tokens are used in the order given")
        assert bsa.check(q, k, bsa.HeadMasks(self.blocks() | True)).topics == (
            "all-true",
            "little-sparsity",
        )

    def test_packed_tokens_must_be_in_order_already(self):
        q, k, _, options = packed()
        report = bsa.check(q, k, self.blocks(), **options)
        assert (report.topics, report.ok) == (("order",), True)
        assert "bsa.pack(q, layout)" in str(report)
        assert bsa.check(q, k, bsa.HeadMasks(self.blocks(), layout=TILES), **options).topics == (
            "order",
        )
        assert bsa.check(q, k, self.blocks(TokenLayout((32, 64))), **options).findings == ()

    def test_joined_and_moved_masks_are_remembered_where_that_is_cheap(self):
        q, k, _ = good()
        joined = (Pattern("axial") | Pattern("strided", stride=5))(TILES)
        assert bsa.check(q, k, bsa.HeadMasks(stack_heads([joined] * 4, 1))).topics == ("order",)
        # The layout of a mask that torch computed is unknown.
        some = [local_window(TILES, 4), local_window(TILES, 2) | joined] * 2
        assert bsa.check(q, k, bsa.HeadMasks(stack_heads(some, 1))).findings[0].level == "error"

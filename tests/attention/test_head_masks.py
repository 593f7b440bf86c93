from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from bsa_vision import HeadMasks, LayerSpec, ModelSpec, SparsityPlan, pack_head_masks
from bsa_vision.attention.mask_source import from_handle
from bsa_vision.masks import Pattern, TokenLayout, local_window, random_blocks, stack_heads
from bsa_vision.masks.origin import layouts_of


def base(slices=2, rows=3, columns=3, batch=1):
    mask = torch.zeros(batch, slices, rows, columns, dtype=torch.bool)
    for s in range(slices):
        mask[:, s, :, s % columns] = True
    return mask


class TestConventions:
    def test_default_is_one_slice_per_head(self):
        assert HeadMasks(base(3)).slices == (1, 2, 3)

    def test_ones_are_counted_in_head_order(self):
        assert HeadMasks(base(2), [1, 0, 1]).slices == (1, 0, 2)

    def test_any_entry_of_two_makes_all_explicit(self):
        masks = HeadMasks(base(2), [2, 0, 1, 2])
        assert masks.slices == (2, 0, 1, 2)
        blocks = masks.block_mask(384, 384)[0]
        assert torch.equal(blocks[0], base(2)[0, 1])
        assert torch.equal(blocks[2], base(2)[0, 0])
        assert blocks[1].all()

    def test_more_slices_than_used(self):
        assert HeadMasks(base(3), [1, 2, 0]).slices == (1, 2, 0)

    def test_tensor_list_and_tuple_are_alike(self):
        kinds = [
            HeadMasks(base(), t).slices for t in ([1, 1], (1, 1), torch.ones(2, dtype=torch.int32))
        ]
        assert len(set(kinds)) == 1

    def test_the_kernels_tensors_come_back(self):
        masks = HeadMasks(base(2), [1, -1, 1], [0, 0, 2, 3, 0, 0])
        assert masks.head_mask_type.dtype == masks.streaming_info.dtype == torch.int32
        assert masks.head_mask_type.tolist() == [1, -1, 1]
        assert masks.streaming_info.tolist() == [0, 0, 2, 3, 0, 0]
        assert HeadMasks(base(3)).head_mask_type.tolist() == [1, 1, 1]
        assert HeadMasks(base(3)).streaming_info is None


class TestMeaning:
    def test_sparsity_is_counted(self):
        masks = HeadMasks(base(2), [1, 0, 1])
        assert masks.head_sparsity == pytest.approx((2 / 3, 0, 2 / 3))
        assert masks.sparsity == pytest.approx(4 / 9)

    def test_streaming_blocks(self):
        masks = HeadMasks(None, [-1], [1, 1], layout=TokenLayout((16, 32)))
        assert torch.equal(
            masks.block_mask(512, 512)[0, 0], torch.tensor([True, False, False, True]).expand(4, 4)
        )
        causal = masks.block_mask(512, 512, causal=True)[0, 0]
        assert causal.tolist() == [
            [True, False, False, False],
            [True, True, False, False],
            [True, False, True, False],
            [True, False, False, True],
        ]
        assert masks.sparsity == 0.5

    def test_short_sequences_use_the_top_left(self):
        mask = torch.rand(1, 2, 4, 5) < 0.5
        masks = HeadMasks(mask, allow_empty_rows=True)
        assert torch.equal(masks.block_mask(130, 300), mask[:, :, :2, :3])

    def test_block_rows_merge_neighbours(self):
        mask = torch.tensor([[[[1, 1, 0, 1], [0, 0, 0, 0]]]]).bool()
        (head,) = HeadMasks(mask, allow_empty_rows=True, block_size=10).block_rows(15, 37)[0]
        assert [(row.start, row.stop, row.runs) for row in head] == [
            (0, 10, ((0, 20), (30, 37))),
            (10, 15, ()),
        ]

    def test_block_rows_are_cached(self):
        masks = HeadMasks(base())
        assert masks.block_rows(300, 300) is masks.block_rows(300, 300)

    def test_all_dense(self):
        masks = HeadMasks(None, [0, 0])
        assert masks.all_dense
        assert masks.sparsity == 0
        assert not HeadMasks(base()).all_dense

    def test_repr(self):
        assert "3 heads: 1 dense, 2 block-sparse, 0 streaming" in repr(
            HeadMasks(base(2), [1, 0, 1])
        )


class TestCopies:
    def test_pickle_and_deepcopy(self):
        layout = TokenLayout((16, 24), order="tile")
        masks = HeadMasks(stack_heads([local_window(layout, 2)], 1), layout=layout)
        masks.block_rows(384, 384)
        for other in (pickle.loads(pickle.dumps(masks)), copy.deepcopy(masks), copy.copy(masks)):
            assert torch.equal(other.base_blockmask, masks.base_blockmask)
            assert other.layout == layout
            assert other.handle != masks.handle
            assert from_handle(other.handle) is other

    def test_a_dead_handle_is_an_error(self):
        handle = HeadMasks(base()).handle
        with pytest.raises(RuntimeError, match=rf"handle {handle}\) no longer exist.*HeadMasks"):
            from_handle(handle)

    def test_later_writes_to_the_callers_tensor_do_not_count(self):
        mask = base()
        masks = HeadMasks(mask)
        mask[:] = True
        assert masks.sparsity > 0


LAYOUT = TokenLayout((16, 24))
BAD = {
    "not a tensor": (
        dict(base_blockmask=[[True]]),
        TypeError,
        "base_blockmask is a list: expected a bool tensor; convert",
    ),
    "dtype": (
        dict(base_blockmask=base().float()),
        TypeError,
        "dtype torch.float32: expected torch.bool.*use mask.bool",
    ),
    "rank": (
        dict(base_blockmask=base()[0]),
        ValueError,
        r"shape \(2, 3, 3\): expected \(B or 1, S, R, C\).*mask\[None",
    ),
    "nothing": (
        dict(base_blockmask=None),
        ValueError,
        "base_blockmask and head_mask_type are both None: pass one",
    ),
    "too few slices": (
        dict(base_blockmask=base(), head_mask_type=[1, 1, 1]),
        ValueError,
        "3 ones, base_blockmask 2 slices",
    ),
    "too many slices": (
        dict(base_blockmask=base(), head_mask_type=[1, 0]),
        ValueError,
        "1 ones, base_blockmask 2 slices",
    ),
    "slice beyond": (
        dict(base_blockmask=base(), head_mask_type=[1, 3]),
        ValueError,
        "slice 3, base_blockmask has 2",
    ),
    "mixed conventions": (
        dict(base_blockmask=base(3), head_mask_type=[1, 1, 2]),
        ValueError,
        r"\(1, 1, 2\) mixes ones with larger entries.*write 1 to 3, or only ones",
    ),
    "below -1": (
        dict(base_blockmask=base(), head_mask_type=[1, -2]),
        ValueError,
        r"head_mask_type=\(1, -2\): expected entries -1 \(streaming\), 0 \(dense\)",
    ),
    "types float": (
        dict(base_blockmask=base(), head_mask_type=torch.ones(2)),
        TypeError,
        "torch.float32.*int32 tensor",
    ),
    "no streaming info": (
        dict(base_blockmask=None, head_mask_type=[-1]),
        ValueError,
        "head 0 is a streaming head.*2 ints",
    ),
    "streaming size": (
        dict(base_blockmask=None, head_mask_type=[-1, 0], streaming_info=[1, 1]),
        ValueError,
        r"streaming_info=\(1, 1\): expected 4 ints",
    ),
    "streaming empty": (
        dict(base_blockmask=None, head_mask_type=[-1], streaming_info=[0, 0]),
        ValueError,
        "streaming head 0 has sink=0 and local=0.*allow_empty_rows",
    ),
    "empty row": (
        dict(base_blockmask=torch.eye(3, dtype=torch.bool)[None, None] & (torch.arange(3) != 1)),
        ValueError,
        r"query block 1 of image 0, slice 1 keeps no key block \(1 such rows\).*"
        "allow_empty_rows=True",
    ),
    "layout rows": (
        dict(base_blockmask=base(2, 4, 3), layout=LAYOUT),
        ValueError,
        "4 block rows, layout has 384 tokens in 3",
    ),
    "layout columns": (
        dict(base_blockmask=base(2, 3, 3), layout=LAYOUT, kv_layout=TokenLayout((8, 8))),
        ValueError,
        "3 block columns, kv_layout has 64 tokens in 1",
    ),
    "kv only": (
        dict(base_blockmask=base(), kv_layout=LAYOUT),
        ValueError,
        "kv_layout is given without layout",
    ),
    "block sizes": (
        dict(base_blockmask=base(), layout=LAYOUT, kv_layout=TokenLayout((16, 24), block_size=64)),
        ValueError,
        "kv_layout.block_size=64 differs from 128",
    ),
    "two block sizes": (
        dict(base_blockmask=base(), layout=LAYOUT, block_size=64),
        ValueError,
        "block_size=64 but layout.block_size=128: they must be equal",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        HeadMasks(**arguments)


def test_empty_rows_can_be_allowed():
    assert HeadMasks(torch.zeros(1, 1, 2, 2, dtype=torch.bool), allow_empty_rows=True).sparsity == 1


def test_unused_slices_may_be_empty():
    mask = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)]).bool()[None]
    assert HeadMasks(torch.cat([mask, mask[:, :1]], 1), [3, 1]).slices == (3, 1)
    with pytest.raises(ValueError, match="slice 2 keeps no key block"):
        HeadMasks(torch.cat([mask, mask[:, :1]], 1), [3, 2])


class TestPackHeadMasks:
    def test_pads_to_the_longest(self):
        small, large = HeadMasks(base(1, 2, 2)), HeadMasks(base(1, 4, 4))
        packed = pack_head_masks([small, large])
        assert packed.base_blockmask.shape == (2, 1, 4, 4)
        assert torch.equal(packed.base_blockmask[0, :, :2, :2], small.base_blockmask[0])
        assert not packed.base_blockmask[0, :, 2:].any()

    def test_errors(self):
        with pytest.raises(
            ValueError, match=r"image 1 has head types \(0, 1\).*the same head types"
        ):
            pack_head_masks([HeadMasks(base(2)), HeadMasks(base(1), [0, 1])])
        with pytest.raises(ValueError, match="image 0 has a base_blockmask for 2 images"):
            pack_head_masks([HeadMasks(base(batch=2))])


class TestFromPatterns:
    layout = TokenLayout((9, 14), num_prefix_tokens=5, order="tile", tile=(2, 4), block_size=8)

    def test_one_pattern_per_head(self):
        def diagonal(layout):
            return torch.eye(layout.num_blocks, dtype=torch.bool)

        mask = torch.rand(17, 17) < 0.5
        mask.fill_diagonal_(True)
        near = Pattern("local_window", radius=2)
        masks = HeadMasks.from_patterns(
            self.layout, ["dense", near, "axial", diagonal, mask, "dense"]
        )
        special = self.layout.special_blocks
        assert masks.slices == (0, 1, 2, 3, 4, 0)
        assert masks.layout is masks.kv_layout is self.layout
        assert (masks.block_size, masks.num_blocks) == (8, (17, 17))
        expected = [
            near(self.layout),
            Pattern("axial")(self.layout),
            diagonal(self.layout) | special[:, None] | special,
            mask,
        ]
        assert torch.equal(masks.base_blockmask[0], torch.stack(expected))

    def test_equals_the_masks_of_a_plan(self):
        heads = [
            "dense",
            Pattern("random_blocks", sparsity=0.6, seed=3),
            Pattern("special") | Pattern("axial"),
        ]
        spec = ModelSpec(
            "vit",
            (LayerSpec("a", 0, 3, 8), LayerSpec("b", 1, 3, 8)),
            (9, 14),
            (8, 8),
            num_prefix_tokens=5,
        )
        names = ("dense", "one", "two")
        plan = SparsityPlan(
            spec.fingerprint,
            dict(zip(names[1:], heads[1:])),
            {"self.1": names},
            "tile",
            (2, 4),
            block_size=8,
        )
        found = HeadMasks.from_patterns(self.layout, heads, stream=3)
        assert torch.equal(found.base_blockmask, plan.compile("self.1", self.layout).base_blockmask)
        other = HeadMasks.from_patterns(self.layout, heads)
        assert not torch.equal(found.base_blockmask, other.base_blockmask)

    def test_random_heads_draw_anew(self):
        masks = HeadMasks.from_patterns(
            self.layout, Pattern("random_blocks", sparsity=0.6), heads=3
        )
        expected = [random_blocks(self.layout, 0.6, stream=head) for head in range(3)]
        assert torch.equal(masks.base_blockmask, stack_heads(expected, 1))
        assert not torch.equal(expected[0], expected[1])

    def test_what_keeps_everything_is_dense(self):
        assert HeadMasks.from_patterns(
            self.layout, [Pattern("local_window", radius=99), "axial"]
        ).slices == (0, 1)
        assert HeadMasks.from_patterns(self.layout, "dense", heads=2).all_dense

    def test_keys_with_another_layout(self):
        keys = TokenLayout(
            (9, 14), num_suffix_tokens=3, order="tile", tile=(2, 4), block_size=8, frames=2
        )
        near = Pattern("local_window", radius=1)
        masks = HeadMasks.from_patterns(
            self.layout, [near, lambda queries, keys: near(queries, keys=keys)], kv_layout=keys
        )
        assert masks.kv_layout is keys
        assert torch.equal(masks.base_blockmask[0], near(self.layout, keys=keys).expand(2, -1, -1))
        with pytest.raises(
            ValueError, match="pattern 'strided' needs keys that are the queries' tokens"
        ):
            HeadMasks.from_patterns(self.layout, "strided", heads=1, kv_layout=keys)

    def test_prompts_and_masks_of_several_images(self):
        region = Pattern("prompt_region", radius=1, near=0)
        boxes = [[(0, 0, 0, 0)], [(8, 13, 8, 13), (4, 4, 5, 5)]]
        both = torch.stack([local_window(self.layout, 0), local_window(self.layout, 1)])
        masks = HeadMasks.from_patterns(self.layout, [region, both, "axial"], boxes=boxes)
        expected = [region(self.layout, boxes=image) for image in boxes]
        assert torch.equal(masks.base_blockmask[:, 0], torch.stack(expected))
        assert torch.equal(masks.base_blockmask[:, 1], both)
        assert not torch.equal(*expected)
        with pytest.raises(ValueError, match=r"masks for \[2, 3\] images"):
            HeadMasks.from_patterns(self.layout, [region, both[[0, 1, 1]]], boxes=boxes)

    def test_empty_rows(self):
        nothing = torch.zeros(17, 17, dtype=torch.bool)
        with pytest.raises(ValueError, match="keeps no key block"):
            HeadMasks.from_patterns(self.layout, [nothing])
        assert HeadMasks.from_patterns(self.layout, [nothing], allow_empty_rows=True).sparsity == 1

    def test_what_masks_were_made_for_is_in_no_file(self):
        """A tensor attribute would be saved, and torch.load(weights_only=True) would refuse it."""
        mask, file = local_window(self.layout, 1), io.BytesIO()
        assert layouts_of(mask) == (self.layout, self.layout)
        torch.save(mask, file)
        file.seek(0)
        again = torch.load(file, weights_only=True)
        assert torch.equal(again, mask)
        assert layouts_of(again) is None
        assert vars(mask) == {}

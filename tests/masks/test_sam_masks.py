"""The generators for SAM shapes, against brute force."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsa_vision.masks import (
    generate_sam_cross_attention_mask,
    generate_sam_hierarchical_mask,
    generate_sam_hybrid_encoder_mask,
    generate_sam_image_to_prompt_mask,
    generate_sam_region_focused_mask,
)
from tests.helpers.generators import block_sizes, property_test, sam, same, sides
from tests.helpers.oracles_masks import Blocks, kept
from tests.masks.test_generators import call


class TestImageToPrompt:
    @property_test
    @given(grid=sides, prompts=st.integers(1, 9), block_size=block_sizes, sparsity=st.floats(0, 1))
    def test_brute_force(self, grid, prompts, block_size, sparsity):
        tokens = grid[0] * grid[1]
        image_blocks = tokens // block_size
        blocks = sam(grid, prompts, block_size)
        assert blocks.special.tolist() == [i >= image_blocks for i in range(blocks.count)]
        base = generate_sam_image_to_prompt_mask(
            tokens, prompts, block_size, 2, 3, image_sparsity=sparsity, grid=grid
        )
        k = kept(sparsity, image_blocks)
        assert same(base, [blocks.keep_special(blocks.nearest(k, range(image_blocks)))] * 3)
        assert (base[:, :, :image_blocks, :image_blocks].sum(-1) == min(k, image_blocks)).all()
        assert base[:, :, image_blocks:].all()
        assert base[:, :, :, image_blocks:].all()

    @pytest.mark.parametrize("sparsity", [0, 0.25, 0.5, 0.75, 0.9, 1])
    @pytest.mark.parametrize(("tokens", "block_size"), [(4096, 128), (4096, 64), (1024, 16)])
    def test_requested_sparsity_is_realised(self, tokens, block_size, sparsity):
        base = generate_sam_image_to_prompt_mask(
            tokens, 5, block_size, 1, 2, image_sparsity=sparsity
        )
        image_blocks = tokens // block_size
        assert base.shape[-1] == image_blocks + 1
        realised = 1 - base[..., :image_blocks, :image_blocks].double().mean().item()
        k = max(1, round((1 - sparsity) * image_blocks))
        assert realised == pytest.approx(1 - k / image_blocks, abs=1e-12)
        assert abs(realised - sparsity) <= 1 / image_blocks

    def test_prompts_do_not_count_among_the_k(self):
        """Twin: k from all blocks, or prompt blocks as candidates, give another mask."""
        base = generate_sam_image_to_prompt_mask(
            132, 25, 10, 1, 1, image_sparsity=0.7, grid=(12, 11)
        )
        blocks = sam((12, 11), 25, 10)
        assert (blocks.count, int(blocks.special.sum())) == (16, 3)
        assert same(base, [blocks.keep_special(blocks.nearest(4, range(13)))], 1)
        assert not same(base, [blocks.keep_special(blocks.nearest(kept(0.7, 16), range(13)))], 1)
        assert not same(base, [blocks.keep_special(blocks.nearest(4))], 1)

    def test_dense(self):
        base = call(generate_sam_image_to_prompt_mask, sparse_image_to_image=False)
        assert base.shape == (2, 4, 9, 9)
        assert base.all()

    @pytest.mark.parametrize("grid", [(7, 11), (4, 5)])
    def test_no_prompts(self, grid):
        """Every row keeps its nearest blocks, including its own, if there are no prompts."""
        base = generate_sam_image_to_prompt_mask(grid[0] * grid[1], 0, 10, 1, 1, grid=grid)[0, 0]
        assert base.diagonal().all()
        assert not base.all()
        if grid == (4, 5):
            blocks = sam(grid, 0, 10)
            assert np.array_equal(base, blocks.nearest(1))

    def test_defaults(self):
        base = generate_sam_image_to_prompt_mask(256, 5, 16, 1, 1)
        blocks = sam((16, 16), 5, 16)
        assert same(base, [blocks.keep_special(blocks.nearest(8, range(16)))], 1)


class TestHierarchical:
    @property_test
    @given(
        grid=sides, prompts=st.integers(0, 9), block_size=block_sizes, num_heads=st.integers(1, 6)
    )
    def test_brute_force(self, grid, prompts, block_size, num_heads):
        blocks, g = sam(grid, prompts, block_size), max(grid)
        base = generate_sam_hierarchical_mask(
            grid[0] * grid[1], prompts, block_size, 2, num_heads, grid=grid
        )
        assert same(base, [blocks.within(1 + i * g // num_heads) for i in range(num_heads)])

    def test_radii(self):
        base = generate_sam_hierarchical_mask(3 * 17, 2, 2, 1, 4, grid=(3, 17))
        blocks = sam((3, 17), 2, 2)
        assert same(base, [blocks.within(radius) for radius in (1, 5, 9, 13)], 1)
        assert not same(base, [blocks.within(radius + 1) for radius in (1, 5, 9, 13)], 1)

    def test_blocks_of_128(self):
        base = generate_sam_hierarchical_mask(32 * 48, 5, 128, 1, 3, grid=(32, 48))
        blocks = sam((32, 48), 5, 128)
        assert same(base, [blocks.within(radius) for radius in (1, 17, 33)], 1)


def focused(blocks: Blocks, positions, radius: int) -> np.ndarray:
    focus = blocks.focus(positions, radius)
    return blocks.any_rule((blocks.token_distance("l1") <= 2) | (focus[:, None] & focus))


class TestRegionFocused:
    @property_test
    @given(
        grid=sides,
        prompts=st.integers(0, 9),
        block_size=block_sizes,
        radius=st.integers(0, 9),
        data=st.data(),
    )
    def test_one_list_for_the_batch(self, grid, prompts, block_size, radius, data):
        positions = data.draw(
            st.lists(st.tuples(*(st.integers(0, side - 1) for side in grid)), max_size=4)
        )
        base = generate_sam_region_focused_mask(
            grid[0] * grid[1], prompts, positions, block_size, 2, 3, radius, grid=grid
        )
        assert same(base, [focused(sam(grid, prompts, block_size), positions, radius)] * 3)

    @property_test
    @given(
        grid=sides,
        prompts=st.integers(0, 9),
        block_size=block_sizes,
        radius=st.integers(0, 9),
        data=st.data(),
    )
    def test_one_list_per_image(self, grid, prompts, block_size, radius, data):
        position = st.tuples(*(st.integers(0, side - 1) for side in grid))
        image = st.lists(position, min_size=1, max_size=3)
        per_image = data.draw(st.lists(image, min_size=3, max_size=3))
        base = generate_sam_region_focused_mask(
            grid[0] * grid[1], prompts, per_image, block_size, 3, 2, radius, grid=grid
        )
        assert base.is_contiguous()
        blocks = sam(grid, prompts, block_size)
        for image, positions in zip(base, per_image, strict=True):
            assert same(image[None], [focused(blocks, positions, radius)] * 2, 1)

    @pytest.mark.parametrize("per_image", [[[(0, 0), (1, 1)], [(6, 10), (5, 5)]], [[(0, 0)], []]])
    def test_images_differ(self, per_image):
        make = functools.partial(call, generate_sam_region_focused_mask, focus_radius=4)
        base = make(prompt_positions=per_image)
        assert not torch.equal(base[0], base[1])
        for image, positions in zip(base, per_image, strict=True):
            assert torch.equal(image, make(prompt_positions=positions, batch_size=1)[0])

    def test_radius_position_and_local_reach_count(self):
        """Twin: a change of any part of the definition gives another mask."""
        base = generate_sam_region_focused_mask(
            12 * 17, 3, [(1, 2), (10, 14)], 4, 1, 1, 3, grid=(12, 17)
        )
        blocks = sam((12, 17), 3, 4)
        assert same(base, [focused(blocks, [(1, 2), (10, 14)], 3)], 1)
        others = [
            focused(blocks, [(1, 2), (10, 14)], 4),
            focused(blocks, [(1, 2)], 3) | focused(blocks, [(10, 14)], 3),  # two separate regions
            focused(blocks, [(2, 1), (10, 14)], 3),
            blocks.within(2),
        ]
        assert not any(np.array_equal(base[0, 0], other) for other in others)
        focus = blocks.focus([(1, 2), (10, 14)], 3)
        assert not np.array_equal(base[0, 0], blocks.any_rule(focus[:, None] & focus))

    def test_no_position_is_local_only(self):
        base = call(generate_sam_region_focused_mask, prompt_positions=[])
        assert same(base, [sam((7, 11), 5, 10).within(2)] * 4)

    def test_default_radius(self):
        base = generate_sam_region_focused_mask(1024, 5, [(3, 28)], 16, 1, 1)
        assert same(base, [focused(sam((32, 32), 5, 16), [(3, 28)], 8)], 1)

    @pytest.mark.parametrize(
        "positions",
        [((1, 2), (6, 10)), [[1, 2], [6, 10]], torch.tensor([[1, 2], [6, 10]])],
        ids=["tuples", "lists", "tensor"],
    )
    def test_kinds_of_positions(self, positions):
        expected = call(generate_sam_region_focused_mask)
        assert torch.equal(
            call(generate_sam_region_focused_mask, prompt_positions=positions), expected
        )

    def test_tensor_per_image(self):
        positions = torch.tensor([[[1, 2], [6, 10]], [[0, 0], [3, 3]]])
        base = call(generate_sam_region_focused_mask, prompt_positions=positions)
        assert torch.equal(
            base, call(generate_sam_region_focused_mask, prompt_positions=positions.tolist())
        )
        assert not torch.equal(base[0], base[1])


class TestHybridEncoder:
    @property_test
    @given(
        grid=sides, block_size=block_sizes, sparsity=st.floats(0, 1), dense_heads=st.integers(0, 5)
    )
    def test_brute_force(self, grid, block_size, sparsity, dense_heads):
        base, head_mask_type = generate_sam_hybrid_encoder_mask(
            grid[0] * grid[1], block_size, 2, 5, dense_heads, sparsity, grid=grid
        )
        blocks = sam(grid, 0, block_size)
        k = kept(sparsity, blocks.count)
        assert same(base, [blocks.nearest(k)] * (5 - dense_heads))
        assert (base.sum(-1) == k).all()
        assert head_mask_type.dtype == torch.int32
        assert head_mask_type.tolist() == [0] * dense_heads + [1] * (5 - dense_heads)

    def test_defaults(self):
        base, head_mask_type = generate_sam_hybrid_encoder_mask(1024, 64, 1, 12)
        assert same(base, [sam((32, 32), 0, 64).nearest(6)] * 8, 1)
        assert head_mask_type.tolist() == [0] * 4 + [1] * 8


class TestCrossAttention:
    @property_test
    @given(
        queries=st.integers(1, 90),
        keys=st.integers(1, 300),
        block_size=block_sizes,
        sparsity=st.floats(0, 1),
    )
    def test_rectangular_and_keeps_k(self, queries, keys, block_size, sparsity):
        base = generate_sam_cross_attention_mask(queries, keys, block_size, 2, 3, sparsity)
        rows, columns = (len(range(0, tokens, block_size)) for tokens in (queries, keys))
        assert base.shape == (2, 3, rows, columns)
        assert torch.equal(base[0], base[1])
        assert (base.sum(-1) == kept(sparsity, columns)).all()

    def test_every_block_is_as_likely(self):
        base = call(generate_sam_cross_attention_mask, num_heads=2000, batch_size=1)
        assert (base[0].double().mean(0) - 0.5).abs().max() < 0.06

    def test_rows_differ(self):
        base = generate_sam_cross_attention_mask(4096, 4096, 128, 1, 1)
        assert len({tuple(row.tolist()) for row in base[0, 0]}) == 32


@pytest.mark.parametrize(
    ("positions", "shown"),
    [
        ([(7, 0)], r"\(7, 0\) lies outside the grid of 7 x 11 .*0 to 6.*0 to 10; divide"),
        ([(0, 11)], r"\(0, 11\) lies outside the grid of 7 x 11 .*0 to 6.*0 to 10; divide"),
        ([(1, 2), (10, 6)], r"\(10, 6\) lies outside the grid of 7 x 11"),  # column first
        ([(-1, 2)], r"-1: expected an integer >= 0"),
        ([(1, -2)], r"-2: expected an integer >= 0"),
        ([(1.0, 2)], r"1\.0: expected an integer >= \d"),
        ([(True, 2)], r"True: expected an integer >= \d"),
        (torch.tensor([[1.5, 2.0]]), r"1\.5: expected an integer >= \d"),
        ((1, 2), r"prompt_positions=\(1, 2\): .*pairs.*; wrap"),
        ([1, 2, 3], r"prompt_positions=\[1, 2, 3\]: .*pairs.*; wrap"),
        ([[(1, 2)], [(7, 0)]], r"\(7, 0\) lies outside the grid of 7 x 11"),
        ([[(1, 2)], [(1, 2, 3)]], r"\(1, 2, 3\): expected a pair"),
        ([[(1, 2)], [3]], r"3: expected a pair"),
        ([(1, 2), [(3, 4)]], r"=1: expected a pair"),
        ([(1, 2, 3), (4, 5, 6)], r"=1: expected a pair"),
        ([(1,), (2,)], r"=1: expected a pair"),
        (["ab", "cd"], r"='a': expected a pair"),
        (5, r"prompt_positions=5: .*pairs.*; "),
        (None, r"prompt_positions=None: .*pairs.*; "),
        (torch.tensor(5), r"prompt_positions=.*5.*: .*pairs.*; "),
        (
            [[(1, 2)]],
            r"lists for 1 images, batch_size=2: expected one list .*whole batch, or one per image",
        ),
        (
            [[(1, 2)], [(3, 4)], [(5, 6)]],
            r"lists for 3 images, batch_size=2: .*or one per image",
        ),
        (
            torch.ones(3, 1, 2, dtype=torch.int64),
            r"lists for 3 images, batch_size=2: .*or one per image",
        ),
    ],
    ids=repr,
)
def test_bad_prompt_positions(positions, shown):
    with pytest.raises(ValueError, match=shown):
        call(generate_sam_region_focused_mask, prompt_positions=positions)

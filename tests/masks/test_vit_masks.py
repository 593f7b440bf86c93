"""The generators for ViT shapes, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsa_vision.masks import (
    generate_vit_hybrid_mask,
    generate_vit_multiscale_mask,
    generate_vit_random_sparse_mask,
    generate_vit_spatial_locality_mask,
    generate_vit_strided_mask,
)
from tests.helpers.generators import block_sizes, property_test, sam, same, sides, vit
from tests.helpers.oracles_masks import kept
from tests.masks.test_generators import call


class TestSpatialLocality:
    @property_test
    @given(
        grid=sides,
        block_size=block_sizes,
        radius=st.integers(0, 8),
        cls=st.booleans(),
        patch=st.integers(1, 16),
    )
    def test_brute_force(self, grid, block_size, radius, cls, patch):
        pixels = (grid[0] * patch, grid[1] * patch)
        base = generate_vit_spatial_locality_mask(pixels, patch, block_size, 2, 3, radius, cls)
        assert same(base, [vit(grid, block_size, cls).within(2 * radius)] * 3)

    def test_default_and_its_neighbours(self):
        """Twin: other radii, no CLS, or swapped sides give another mask."""
        base = call(generate_vit_spatial_locality_mask, batch_size=1, num_heads=1)
        assert same(base, [vit((7, 11), 10).within(2)], 1)
        others = [
            vit((7, 11), 10).within(4),
            vit((7, 11), 10).within(0),
            vit((7, 11), 10, False).within(2),
            vit((7, 11), 10).within(2, "axis"),
            sam((7, 11), 1, 10).within(2),
        ]
        assert not any(np.array_equal(base[0, 0], other) for other in others)
        turned = call(
            generate_vit_spatial_locality_mask, img_size=(44, 28), batch_size=1, num_heads=1
        )
        assert same(turned, [vit((11, 7), 10).within(2)], 1)

    def test_l1_and_not_chebyshev(self):
        grid = {"img_size": (12, 16), "patch_size": 1, "block_size": 3, "locality_radius": 2}
        base = call(generate_vit_spatial_locality_mask, **grid, batch_size=1, num_heads=1)
        assert same(base, [vit((12, 16), 3).within(4)], 1)
        assert not np.array_equal(base[0, 0], vit((12, 16), 3).within(4, "chebyshev"))

    @pytest.mark.parametrize("img_size", [224, (224, 224), [224, 224], torch.Size([224, 224])])
    def test_vit_b_16_at_224(self, img_size):
        base = generate_vit_spatial_locality_mask(img_size, 16, 128, 2, 12)
        assert same(base, [vit((14, 14), 128).within(2)] * 12)

    def test_32_by_48_patches_in_blocks_of_128(self):
        base = generate_vit_spatial_locality_mask((512, 768), 16, 128, 1, 1, 3)
        assert same(base, [vit((32, 48), 128).within(6)], 1)


class TestRandomSparse:
    @property_test
    @given(grid=sides, block_size=block_sizes, sparsity=st.floats(0, 1), seed=st.integers(0, 2**32))
    def test_keeps_k_and_its_own(self, grid, block_size, sparsity, seed):
        base = generate_vit_random_sparse_mask(
            grid, 1, block_size, 2, 3, sparsity, False, seed=seed
        )
        blocks = vit(grid, block_size, False).count
        assert base.shape == (2, 3, blocks, blocks)
        assert torch.equal(base[0], base[1])
        assert base.diagonal(dim1=-2, dim2=-1).all()
        assert (base.sum(-1) == kept(sparsity, blocks)).all()

    @property_test
    @given(grid=sides, block_size=block_sizes, sparsity=st.floats(0, 1), seed=st.integers(0, 2**32))
    def test_then_cls_row_and_column(self, grid, block_size, sparsity, seed):
        base = generate_vit_random_sparse_mask(grid, 1, block_size, 2, 3, sparsity, seed=seed)
        blocks = vit(grid, block_size).count
        k = kept(sparsity, blocks)
        assert base.shape == (2, 3, blocks, blocks)
        assert base[:, :, 0].all()
        assert base[:, :, :, 0].all()
        assert base.diagonal(dim1=-2, dim2=-1).all()
        count = base[:, :, 1:].sum(-1)
        assert ((count == k) | (count == k + 1)).all()  # CLS is one of the k, or added

    def test_cls_is_sometimes_among_the_k_and_sometimes_added(self):
        count = call(generate_vit_random_sparse_mask, num_heads=64)[:, :, 1:].sum(-1)
        assert set(count.unique().tolist()) == {4, 5}

    def test_every_other_block_is_as_likely(self):
        base = call(
            generate_vit_random_sparse_mask, batch_size=1, num_heads=2000, include_cls_token=False
        )
        share = base[0].double().mean(0)
        others = share[~torch.eye(8, dtype=torch.bool)]
        assert (others - 3 / 7).abs().max() < 0.06


class TestStrided:
    @property_test
    @given(grid=sides, block_size=block_sizes, stride=st.integers(1, 9), cls=st.booleans())
    def test_brute_force(self, grid, block_size, stride, cls):
        blocks = vit(grid, block_size, cls)
        expected = np.zeros((blocks.count, blocks.count), dtype=bool)
        expected[:, ::stride] = True
        if cls:
            expected[0] = True
        base = generate_vit_strided_mask(grid, 1, block_size, 2, 3, stride, cls)
        assert same(base, [expected] * 3)

    def test_cls_row_counts(self):
        base = call(generate_vit_strided_mask, stride=3)
        without = call(generate_vit_strided_mask, stride=3, include_cls_token=False)
        assert base[0, 0, 0].all()
        assert without[0, 0].sum(-1).tolist() == [3] * 8
        assert torch.equal(base[:, :, 1:], without[:, :, 1:])


class TestVitHybrid:
    @property_test
    @given(
        grid=sides,
        block_size=block_sizes,
        sparsity=st.floats(0, 1),
        cls=st.booleans(),
        dense_heads=st.integers(0, 5),
    )
    def test_brute_force(self, grid, block_size, sparsity, cls, dense_heads):
        base, head_mask_type = generate_vit_hybrid_mask(
            grid, 1, block_size, 2, 5, dense_heads, sparsity, cls
        )
        blocks = vit(grid, block_size, cls)
        expected = blocks.keep_special(blocks.nearest(kept(sparsity, blocks.count)))
        assert same(base, [expected] * (5 - dense_heads))
        assert base.shape == (2, 5 - dense_heads, blocks.count, blocks.count)
        assert head_mask_type.dtype == torch.int32
        assert head_mask_type.tolist() == [0] * dense_heads + [1] * (5 - dense_heads)

    def test_defaults(self):
        base, head_mask_type = generate_vit_hybrid_mask(224, 16, 32, 1, 12)
        blocks = vit((14, 14), 32)
        assert same(base, [blocks.keep_special(blocks.nearest(kept(0.5, 7)))] * 8, 1)
        assert head_mask_type.tolist() == [0] * 4 + [1] * 8

    def test_no_sparse_heads(self):
        base, head_mask_type = generate_vit_hybrid_mask(224, 16, 128, 3, 4)
        assert base.shape == (3, 0, 2, 2)
        assert head_mask_type.tolist() == [0] * 4

    def test_k_and_metric_count(self):
        """Twin: another k, or another metric, gives another mask."""
        base, _ = generate_vit_hybrid_mask((12, 17), 1, 10, 1, 1, 0, 0.7)
        blocks = vit((12, 17), 10)
        k = kept(0.7, blocks.count)
        assert same(base, [blocks.keep_special(blocks.nearest(k))], 1)
        others = [blocks.nearest(k + 1), blocks.nearest(k - 1), blocks.nearest(k, metric="axis")]
        for other in others:
            assert not np.array_equal(base[0, 0], blocks.keep_special(other))


class TestMultiscale:
    @property_test
    @given(grid=sides, block_size=block_sizes, num_heads=st.integers(1, 6), cls=st.booleans())
    def test_brute_force(self, grid, block_size, num_heads, cls):
        g = max(grid)
        radii = [2 * g]
        if num_heads > 1:
            radii = [2 * (1 + i * (g - 1) // (num_heads - 1)) for i in range(num_heads)]
        blocks = vit(grid, block_size, cls)
        base = generate_vit_multiscale_mask(grid, 1, block_size, 2, num_heads, cls)
        assert same(base, [blocks.within(radius) for radius in radii])
        assert base[:, -1].all()  # the last head keeps every block

    def test_radii_are_per_head_and_from_the_longer_side(self):
        base = generate_vit_multiscale_mask((3, 17), 1, 2, 1, 5, False)
        blocks = vit((3, 17), 2, False)
        radii = [2, 10, 18, 26, 34]
        assert same(base, [blocks.within(radius) for radius in radii], 1)
        assert not same(base, [blocks.within(radius - 2) for radius in radii], 1)
        assert len({int(head.sum()) for head in base[0]}) == 3  # at most 18 patches apart
        turned = generate_vit_multiscale_mask((17, 3), 1, 2, 1, 5, False)
        assert same(turned, [vit((17, 3), 2, False).within(radius) for radius in radii], 1)

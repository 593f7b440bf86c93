from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import masks
from bsa_vision.masks import (
    generate_sam_cross_attention_mask,
    generate_sam_hierarchical_mask,
    generate_sam_hybrid_encoder_mask,
    generate_sam_image_to_prompt_mask,
    generate_sam_region_focused_mask,
    generate_vit_hybrid_mask,
    generate_vit_multiscale_mask,
    generate_vit_random_sparse_mask,
    generate_vit_spatial_locality_mask,
    generate_vit_strided_mask,
)
from tests.helpers.oracles_masks import Blocks, kept, model_order

ROOT = Path(__file__).resolve().parents[2]

property_test = settings(max_examples=50, deadline=None)

# The table of the ten generators: parameters in order with their defaults, then keyword-only ones.
SIGNATURES = {
    "generate_vit_spatial_locality_mask": "img_size, patch_size, block_size, batch_size, num_heads, locality_radius=1, "
    "include_cls_token=True, device=None",
    "generate_vit_random_sparse_mask": "img_size, patch_size, block_size, batch_size, num_heads, sparsity=0.5, "
    "include_cls_token=True, device=None, *, seed=0",
    "generate_vit_strided_mask": "img_size, patch_size, block_size, batch_size, num_heads, stride=2, "
    "include_cls_token=True, device=None",
    "generate_vit_hybrid_mask": "img_size, patch_size, block_size, batch_size, num_heads, num_global_heads=4, "
    "sparsity=0.5, include_cls_token=True, device=None",
    "generate_vit_multiscale_mask": "img_size, patch_size, block_size, batch_size, num_heads, include_cls_token=True, "
    "device=None",
    "generate_sam_image_to_prompt_mask": "num_image_tokens, num_prompt_tokens, block_size, batch_size, num_heads, "
    "sparse_image_to_image=True, image_sparsity=0.5, device=None, *, grid=None",
    "generate_sam_hierarchical_mask": "num_image_tokens, num_prompt_tokens, block_size, batch_size, num_heads, "
    "device=None, *, grid=None",
    "generate_sam_region_focused_mask": "num_image_tokens, num_prompt_tokens, prompt_positions, block_size, batch_size, "
    "num_heads, focus_radius=8, device=None, *, grid=None",
    "generate_sam_hybrid_encoder_mask": "num_image_tokens, block_size, batch_size, num_heads, num_dense_heads=4, "
    "sparsity=0.6, device=None, *, grid=None",
    "generate_sam_cross_attention_mask": "num_decoder_tokens, num_encoder_tokens, block_size, batch_size, num_heads, "
    "encoder_sparsity=0.5, device=None, *, seed=0",
}

# One call of each on a grid of 7 x 11 in blocks of 10, batch 2, 4 heads: neither square nor divisible.
VIT = {"img_size": (28, 44), "patch_size": 4, "block_size": 10, "batch_size": 2, "num_heads": 4}
SAM = {
    "num_image_tokens": 77,
    "num_prompt_tokens": 5,
    "block_size": 10,
    "batch_size": 2,
    "num_heads": 4,
    "grid": (7, 11),
}
ENCODER = {key: value for key, value in SAM.items() if key != "num_prompt_tokens"}
CROSS = {
    "num_decoder_tokens": 45,
    "num_encoder_tokens": 77,
    "block_size": 10,
    "batch_size": 2,
    "num_heads": 4,
}
CALLS = {
    generate_vit_spatial_locality_mask: VIT,
    generate_vit_random_sparse_mask: VIT,
    generate_vit_strided_mask: VIT,
    generate_vit_hybrid_mask: {**VIT, "num_global_heads": 1},
    generate_vit_multiscale_mask: VIT,
    generate_sam_image_to_prompt_mask: SAM,
    generate_sam_hierarchical_mask: SAM,
    generate_sam_region_focused_mask: {
        **SAM,
        "prompt_positions": [(1, 2), (6, 10)],
        "focus_radius": 2,
    },
    generate_sam_hybrid_encoder_mask: {**ENCODER, "num_dense_heads": 1},
    generate_sam_cross_attention_mask: CROSS,
}
RANDOM = (generate_vit_random_sparse_mask, generate_sam_cross_attention_mask)
SAM_ON_A_GRID = (
    generate_sam_image_to_prompt_mask,
    generate_sam_hierarchical_mask,
    generate_sam_region_focused_mask,
    generate_sam_hybrid_encoder_mask,
)

every_generator = pytest.mark.parametrize(
    "generator", CALLS, ids=lambda generator: generator.__name__
)
sides = st.tuples(st.integers(1, 12), st.integers(1, 17))
block_sizes = st.integers(1, 40)


def call(generator, **changes) -> torch.Tensor:
    """The base_blockmask of `generator` on its small example."""
    result = generator(**{**CALLS[generator], **changes})
    return result[0] if isinstance(result, tuple) else result


def same(mask: torch.Tensor, heads: list[np.ndarray], batch_size: int = 2) -> bool:
    """Whether every image of the batch has exactly these heads."""
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert mask.shape[:2] == (batch_size, len(heads))
    return all(
        np.array_equal(head.numpy(), expected)
        for image in mask
        for head, expected in zip(image, heads, strict=True)
    )


def vit(grid, block_size, include_cls_token=True) -> Blocks:
    """CLS before the patches."""
    return Blocks(model_order(grid, start=int(include_cls_token)), grid, block_size)


def sam(grid, num_prompt_tokens, block_size) -> Blocks:
    """Prompts after the patches."""
    return Blocks(model_order(grid, end=num_prompt_tokens), grid, block_size)


@every_generator
class TestCommonRules:
    def test_signature(self, generator):
        described, keyword_only = [], False
        for name, parameter in inspect.signature(generator).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                described.append("*")
                keyword_only = True
            default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
            described.append(name + default)
        assert ", ".join(described) == SIGNATURES[generator.__name__]

    def test_shape_and_type(self, generator):
        base = call(generator)
        rows = {generator_: 8 for generator_ in CALLS} | dict.fromkeys(
            SAM_ON_A_GRID, 9
        )  # 78, 82 tokens
        rows |= {
            generate_sam_hybrid_encoder_mask: 8,
            generate_sam_cross_attention_mask: 5,
        }  # 77, 45
        columns = rows | {generate_sam_cross_attention_mask: 8}
        slices = 3 if "hybrid" in generator.__name__ else 4
        assert base.shape == (2, slices, rows[generator], columns[generator])
        assert base.dtype == torch.bool
        assert base.is_contiguous()
        assert base.device.type == "cpu"
        assert not base.all()
        assert base.any(-1).all()  # no empty rows

    def test_equal_across_the_batch(self, generator):
        base = call(generator, batch_size=3)
        assert base.shape[0] == 3
        assert torch.equal(base[0], base[1])
        assert torch.equal(base[0], base[2])
        assert torch.equal(base[:1], call(generator, batch_size=1))

    def test_results_are_the_callers_own(self, generator):
        base = call(generator)
        expected = base.clone()
        base[0] = ~base[0]
        assert torch.equal(base[1], expected[1])
        assert torch.equal(call(generator), expected)

    def test_default_device(self, generator):
        expected = generator(**CALLS[generator])
        with torch.device("meta"):
            default = generator(**CALLS[generator])
            explicit = generator(**CALLS[generator], device="cpu")
        expected, default, explicit = (
            result if isinstance(result, tuple) else (result,)
            for result in (expected, default, explicit)
        )
        for on_cpu, on_meta, asked in zip(expected, default, explicit, strict=True):
            assert (on_meta.device.type, on_meta.shape, on_meta.dtype) == (
                "meta",
                on_cpu.shape,
                on_cpu.dtype,
            )
            assert (on_cpu.device.type, asked.device.type) == ("cpu", "cpu")
            assert torch.equal(asked, on_cpu)

    @pytest.mark.parametrize("device", ["meta", torch.device("meta")], ids=["str", "device"])
    def test_given_device(self, generator, device):
        result = generator(**CALLS[generator], device=device)
        for tensor in result if isinstance(result, tuple) else (result,):
            assert tensor.device.type == "meta"

    def test_global_generator_is_left_alone_and_plays_no_part(self, generator):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = call(generator)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(call(generator), first)

    def test_default_dtype_plays_no_part(self, generator):
        first = call(generator)
        torch.set_default_dtype(torch.float64)
        try:
            again = call(generator)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(again, first)

    def test_seed_only_where_random(self, generator):
        assert ("seed" in inspect.signature(generator).parameters) == (generator in RANDOM)


def test_all_ten_are_public():
    names = {name for name in masks.__all__ if name.startswith("generate_")}
    assert names == set(SIGNATURES) == {generator.__name__ for generator in CALLS}


@pytest.mark.parametrize("generator", RANDOM, ids=lambda generator: generator.__name__)
class TestRandom:
    def test_seed(self, generator):
        assert torch.equal(call(generator), call(generator, seed=0))
        assert torch.equal(call(generator, seed=7), call(generator, seed=7))
        draws = [call(generator, seed=seed)[0] for seed in range(6)]
        heads = {tuple(head.flatten().tolist()) for draw in draws for head in draw}
        assert len(heads) == 6 * 4  # differ per seed and per head

    @pytest.mark.parametrize("seed", [-1, 0.5, True, None])
    def test_bad_seed(self, generator, seed):
        with pytest.raises(ValueError, match=f"seed={seed}: .*at least 0; give"):
            call(generator, seed=seed)


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
        """Twin: the radius, CLS and the order of the sides are all seen."""
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
        assert ((count == k) | (count == k + 1)).all()  # CLS among the k, or on top of them

    def test_cls_is_not_always_among_the_k_nor_always_on_top(self):
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

    def test_no_sparse_head_is_left(self):
        base, head_mask_type = generate_vit_hybrid_mask(224, 16, 128, 3, 4)
        assert base.shape == (3, 0, 2, 2)
        assert head_mask_type.tolist() == [0] * 4

    def test_k_and_metric_count(self):
        """Twin: one block more, or another notion of near, is another mask."""
        base, _ = generate_vit_hybrid_mask((12, 17), 1, 10, 1, 1, 0, 0.7)
        blocks = vit((12, 17), 10)
        k = kept(0.7, blocks.count)
        assert same(base, [blocks.keep_special(blocks.nearest(k))], 1)
        for other in (
            blocks.nearest(k + 1),
            blocks.nearest(k - 1),
            blocks.nearest(k, metric="axis"),
        ):
            assert not np.array_equal(base[0, 0], blocks.keep_special(other))


class TestMultiscale:
    @property_test
    @given(grid=sides, block_size=block_sizes, num_heads=st.integers(1, 6), cls=st.booleans())
    def test_brute_force(self, grid, block_size, num_heads, cls):
        g = max(grid)
        radii = (
            [2 * g]
            if num_heads == 1
            else [2 * (1 + i * (g - 1) // (num_heads - 1)) for i in range(num_heads)]
        )
        blocks = vit(grid, block_size, cls)
        base = generate_vit_multiscale_mask(grid, 1, block_size, 2, num_heads, cls)
        assert same(base, [blocks.within(radius) for radius in radii])
        assert base[:, -1].all()  # the last head sees everything

    def test_radii_are_per_head_and_from_the_longer_side(self):
        base = generate_vit_multiscale_mask((3, 17), 1, 2, 1, 5, False)
        blocks = vit((3, 17), 2, False)
        radii = [2, 10, 18, 26, 34]
        assert same(base, [blocks.within(radius) for radius in radii], 1)
        assert not same(base, [blocks.within(radius - 2) for radius in radii], 1)
        assert len({int(head.sum()) for head in base[0]}) == 3  # at most 18 patches apart
        turned = generate_vit_multiscale_mask((17, 3), 1, 2, 1, 5, False)
        assert same(turned, [vit((17, 3), 2, False).within(radius) for radius in radii], 1)


class TestImageToPrompt:
    @property_test
    @given(grid=sides, prompts=st.integers(1, 9), block_size=block_sizes, sparsity=st.floats(0, 1))
    def test_brute_force(self, grid, prompts, block_size, sparsity):
        tokens = grid[0] * grid[1]
        image_blocks = tokens // block_size
        blocks = sam(grid, prompts, block_size)
        assert blocks.special.tolist() == [False] * image_blocks + [True] * (
            blocks.count - image_blocks
        )
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
    def test_sparsity_asked_for_is_realised(self, tokens, block_size, sparsity):
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
        """Twin: with k from all blocks, or with prompt blocks as candidates, the mask is another."""
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
        """Without prompts there is nothing special: every row keeps its nearest blocks, its own among them."""
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
        per_image = data.draw(
            st.lists(st.lists(position, min_size=1, max_size=3), min_size=3, max_size=3)
        )
        base = generate_sam_region_focused_mask(
            grid[0] * grid[1], prompts, per_image, block_size, 3, 2, radius, grid=grid
        )
        assert base.is_contiguous()
        for image, positions in zip(base, per_image, strict=True):
            assert same(
                image[None], [focused(sam(grid, prompts, block_size), positions, radius)] * 2, 1
            )

    @pytest.mark.parametrize("per_image", [[[(0, 0), (1, 1)], [(6, 10), (5, 5)]], [[(0, 0)], []]])
    def test_images_differ(self, per_image):
        base = call(generate_sam_region_focused_mask, prompt_positions=per_image, focus_radius=4)
        assert not torch.equal(base[0], base[1])
        for image, positions in zip(base, per_image, strict=True):
            one = call(
                generate_sam_region_focused_mask,
                prompt_positions=positions,
                focus_radius=4,
                batch_size=1,
            )
            assert torch.equal(image, one[0])

    def test_radius_position_and_local_reach_count(self):
        """Twin: each part of the definition shows."""
        base = generate_sam_region_focused_mask(
            12 * 17, 3, [(1, 2), (10, 14)], 4, 1, 1, 3, grid=(12, 17)
        )
        blocks = sam((12, 17), 3, 4)
        assert same(base, [focused(blocks, [(1, 2), (10, 14)], 3)], 1)
        others = [
            focused(blocks, [(1, 2), (10, 14)], 4),
            focused(blocks, [(1, 2)], 3)
            | focused(blocks, [(10, 14)], 3),  # two regions that do not see each other
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


class TestGrid:
    @pytest.mark.parametrize("generator", SAM_ON_A_GRID, ids=lambda generator: generator.__name__)
    def test_squares_need_no_grid(self, generator):
        square = {"num_image_tokens": 36, "block_size": 4}
        if generator is generate_sam_region_focused_mask:
            square |= {"prompt_positions": [(0, 5)]}
        given = call(generator, **square, grid=(6, 6))
        assert torch.equal(call(generator, **square, grid=None), given)
        assert torch.equal(call(generator, **square, grid=[6, 6]), given)
        assert not torch.equal(call(generator, **square, grid=(4, 9)), given)


SIZE = r": expected a whole number of at least \d; give"
BAD_SIZES = [
    (generator, name, value)
    for generator, arguments in CALLS.items()
    for name in arguments
    if name
    in (
        "patch_size",
        "block_size",
        "batch_size",
        "num_heads",
        "num_image_tokens",
        "num_decoder_tokens",
        "num_encoder_tokens",
    )
    for value in (0, -1, 2.0, True, "4", None)
]


@pytest.mark.parametrize(("generator", "name", "value"), BAD_SIZES)
def test_bad_sizes(generator, name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}") + SIZE):
        call(generator, **{name: value})


@pytest.mark.parametrize(
    ("generator", "changes", "match"),
    [
        (
            generate_vit_strided_mask,
            {"img_size": (28, 45)},
            r"\(28, 45\) is not a whole number of patches of 4.*\(28, 48\)",
        ),
        (
            generate_vit_strided_mask,
            {"img_size": (29, 44)},
            r"\(29, 44\) is not a whole number of patches of 4.*\(32, 44\)",
        ),
        (
            generate_vit_hybrid_mask,
            {"img_size": 30},
            r"\(30, 30\) is not a whole number of patches of 4.*\(32, 32\)",
        ),
        (generate_vit_multiscale_mask, {"img_size": 0}, r"img_size.*=0: .*at least 1; give"),
        (
            generate_vit_multiscale_mask,
            {"img_size": (28, -4)},
            r"img_size.*=-4: .*at least 1; give",
        ),
        (
            generate_vit_multiscale_mask,
            {"img_size": (28.0, 44)},
            r"img_size.*=28\.0: .*whole number.*; give",
        ),
        (generate_vit_multiscale_mask, {"img_size": 28.0}, r"img_size=28\.0: .*; give"),
        (generate_vit_multiscale_mask, {"img_size": True}, r"img_size.*=True: .*; give"),
        (
            generate_vit_multiscale_mask,
            {"img_size": (28, 44, 3)},
            r"img_size=\(28, 44, 3\): .*pair.*; give",
        ),
        (
            generate_vit_spatial_locality_mask,
            {"locality_radius": -1},
            r"locality_radius=-1: .*at least 0; give",
        ),
        (
            generate_vit_spatial_locality_mask,
            {"locality_radius": 1.5},
            r"locality_radius=1\.5: .*whole number.*; give",
        ),
        (generate_vit_strided_mask, {"stride": 0}, r"stride=0: .*at least 1; give"),
        (generate_vit_strided_mask, {"stride": True}, r"stride=True: .*whole number.*; give"),
        (
            generate_vit_hybrid_mask,
            {"num_global_heads": 5},
            r"num_global_heads=5 .*num_heads=4: .*0 to 4; lower",
        ),
        (
            generate_vit_hybrid_mask,
            {"num_global_heads": -1},
            r"num_global_heads=-1: .*at least 0; give",
        ),
        (
            generate_vit_hybrid_mask,
            {"num_global_heads": True},
            r"num_global_heads=True: .*whole number.*; give",
        ),
        (
            generate_sam_hybrid_encoder_mask,
            {"num_dense_heads": 5},
            r"num_dense_heads=5 .*num_heads=4: .*0 to 4; lower",
        ),
        (
            generate_sam_hybrid_encoder_mask,
            {"num_dense_heads": -2},
            r"num_dense_heads=-2: .*at least 0; give",
        ),
        (
            generate_sam_image_to_prompt_mask,
            {"num_prompt_tokens": -1},
            r"num_prompt_tokens=-1: .*at least 0; give",
        ),
        (
            generate_sam_hierarchical_mask,
            {"num_prompt_tokens": 5.0},
            r"num_prompt_tokens=5\.0: .*whole number.*; give",
        ),
        (
            generate_sam_hierarchical_mask,
            {"num_prompt_tokens": True},
            r"num_prompt_tokens=True: .*; give",
        ),
        (generate_sam_region_focused_mask, {"focus_radius": -1}, r"radius=-1: .*at least 0; give"),
        (
            generate_sam_region_focused_mask,
            {"focus_radius": 2.5},
            r"radius=2\.5: .*whole number.*; give",
        ),
        (
            generate_sam_region_focused_mask,
            {"focus_radius": -1, "prompt_positions": []},
            r"radius=-1: .*at least 0; give",
        ),
    ],
)
def test_bad_arguments(generator, changes, match):
    with pytest.raises(ValueError, match=match):
        call(generator, **changes)


@pytest.mark.parametrize(
    ("generator", "name"),
    [
        (generate_vit_random_sparse_mask, "sparsity"),
        (generate_vit_hybrid_mask, "sparsity"),
        (generate_sam_image_to_prompt_mask, "image_sparsity"),
        (generate_sam_hybrid_encoder_mask, "sparsity"),
        (generate_sam_cross_attention_mask, "encoder_sparsity"),
    ],
)
@pytest.mark.parametrize("value", [-0.01, 1.01, 50, float("nan"), float("inf"), "0.5", None])
def test_bad_sparsity(generator, name, value):
    with pytest.raises(ValueError, match=re.escape(f"sparsity={value!r}") + ": .*0 to 1; give"):
        call(generator, **{name: value})


@pytest.mark.parametrize("generator", SAM_ON_A_GRID, ids=lambda generator: generator.__name__)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grid": None}, r"num_image_tokens=77 is not a square.*: .*grid=\(h, w\)"),
        (
            {"grid": None, "num_image_tokens": 4095},
            r"num_image_tokens=4095 is not a square.*: .*grid=\(h, w\)",
        ),
        (
            {"grid": (7, 12)},
            r"grid=\(7, 12\) holds 84 patches, num_image_tokens=77: .*equal; correct",
        ),
        ({"grid": (1, 1)}, r"grid=\(1, 1\) holds 1 patches, num_image_tokens=77: .*equal; correct"),
        ({"grid": (-7, -11)}, r"grid\[0\]=-7: .*at least 1; give"),
        ({"grid": (7.0, 11)}, r"grid\[0\]=7\.0: .*whole number.*; give"),
        ({"grid": 77}, r"grid=77: .*pair.*; give"),
        ({"grid": (7, 11, 1)}, r"grid=\(7, 11, 1\): .*pair.*; give"),
    ],
)
def test_token_counts_that_fit_no_grid(generator, changes, match):
    with pytest.raises(ValueError, match=match):
        call(generator, **changes)


@pytest.mark.parametrize(
    ("positions", "shown"),
    [
        ([(7, 0)], r"\(7, 0\) lies outside the grid of 7 x 11 .*0 to 6.*0 to 10; divide"),
        ([(0, 11)], r"\(0, 11\) lies outside the grid of 7 x 11 .*0 to 6.*0 to 10; divide"),
        ([(1, 2), (10, 6)], r"\(10, 6\) lies outside the grid of 7 x 11"),  # column first
        ([(-1, 2)], r"-1: .*at least 0; give"),
        ([(1, -2)], r"-2: .*at least 0; give"),
        ([(1.0, 2)], r"1\.0: .*whole number.*; give"),
        ([(True, 2)], r"True: .*whole number.*; give"),
        (torch.tensor([[1.5, 2.0]]), r"1\.5: .*whole number.*; give"),
        ((1, 2), r"prompt_positions=\(1, 2\): .*pairs.*; wrap"),
        ([1, 2, 3], r"prompt_positions=\[1, 2, 3\]: .*pairs.*; wrap"),
        ([[(1, 2)], [(7, 0)]], r"\(7, 0\) lies outside the grid of 7 x 11"),
        ([[(1, 2)], [(1, 2, 3)]], r"\(1, 2, 3\): .*pair.*; give"),
        ([[(1, 2)], [3]], r"3: .*pair.*; give"),
        ([(1, 2), [(3, 4)]], r"=1: .*pair.*; give"),
        ([(1, 2, 3), (4, 5, 6)], r"[=(]1.*: .*pair.*; "),
        ([(1,), (2,)], r"[=(]1.*: .*pair.*; "),
        (["ab", "cd"], r"'a.*: .*pair.*; "),
        (5, r"prompt_positions=5: .*pairs.*; "),
        (None, r"prompt_positions=None: .*pairs.*; "),
        (torch.tensor(5), r"prompt_positions=.*5.*: .*pairs.*; "),
        (
            [[(1, 2)]],
            r"lists for 1 images, batch_size=2: .*one list .*whole batch.*one such list per image",
        ),
        (
            [[(1, 2)], [(3, 4)], [(5, 6)]],
            r"lists for 3 images, batch_size=2: .*one such list per image",
        ),
        (
            torch.ones(3, 1, 2, dtype=torch.int64),
            r"lists for 3 images, batch_size=2: .*one such list per image",
        ),
    ],
    ids=repr,
)
def test_bad_prompt_positions(positions, shown):
    with pytest.raises(ValueError, match=shown):
        call(generate_sam_region_focused_mask, prompt_positions=positions)


def run_script(path: Path | str, cwd: Path) -> str:
    """What the script prints; it must end well and complain about nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, path],
        cwd=cwd,
        env={**environment, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


SCRIPTS = {
    "vit_masks.py": ["spatial locality", "random sparse", "strided", "hybrid", "multiscale"],
    "sam_masks.py": [
        "image to prompt",
        "hierarchical",
        "region focused",
        "hybrid encoder",
        "cross attention",
    ],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("from_root", [True, False], ids=["from the root", "from elsewhere"])
def test_scripts(script, from_root, tmp_path):
    path, cwd = (f"masks/{script}", ROOT) if from_root else (ROOT / "masks" / script, tmp_path)
    entry = (
        r"^(.+): \((\d+), (\d+), (\d+), (\d+)\), sparsity (\d+\.\d)%; head \d+:\n((?:[ ░▒▓█]+\n)+)"
    )
    found = re.findall(entry, run_script(path, cwd), re.MULTILINE)
    for expected in SCRIPTS[script]:
        _, _, _, rows, columns, sparsity, drawing = next(
            entry for entry in found if entry[0].startswith(expected)
        )
        lines = drawing.splitlines()
        assert (len(lines), {len(line) for line in lines}) == (int(rows), {2 * int(columns)})
        assert 0 < float(sparsity) < 100
        assert {"█", " "} <= set(drawing)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_draw_with_the_checkout_they_lie_in(script, tmp_path):
    """Not with an installed `masks`, nor with a folder of that name where they are run."""
    for package in ("masks", "bsa_vision"):
        copied = tmp_path / "checkout" / package
        shutil.copytree(ROOT / package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    drawing = tmp_path / "checkout" / "bsa_vision" / "masks" / "drawing.py"
    drawing.write_text(
        drawing.read_text(encoding="utf-8").replace('" ░▒▓█"', '" .:+#"'), encoding="utf-8"
    )
    (tmp_path / "elsewhere" / "masks").mkdir(parents=True)
    (tmp_path / "elsewhere" / "masks" / "__init__.py").write_text(
        "raise ImportError('a foreign package')"
    )
    printed = run_script(tmp_path / "checkout" / "masks" / script, tmp_path / "elsewhere")
    assert "##" in printed
    assert "█" not in printed

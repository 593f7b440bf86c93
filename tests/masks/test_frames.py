"""Layouts of several frames, and patterns among them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsa_vision.masks import Pattern, TokenLayout
from tests.helpers.oracles_masks import layouts
from tests.masks.test_layout import METRICS, property_test


class TestFrames:
    """Layouts of the memory of video models: frames, then memory pointers."""

    @property_test
    @given(layouts(), st.integers(1, 4))
    def test_each_frame_is_ordered_as_one_image(self, layout, frames):
        image = dataclasses.replace(layout, num_prefix_tokens=0, num_suffix_tokens=0)
        many = dataclasses.replace(layout, frames=frames)
        prefix, suffix = layout.num_prefix_tokens, layout.num_suffix_tokens
        assert many.num_patches == frames * image.num_patches
        assert many.num_tokens == prefix + many.num_patches + suffix
        patches = many.permutation - prefix
        patches = patches[(patches >= 0) & (patches < many.num_patches)]
        for frame, inside in enumerate(patches.split(image.num_patches)):
            assert torch.equal(inside - frame * image.num_patches, image.permutation)
        for found, expected in zip(many.coordinates, image.coordinates, strict=True):
            for frame in found[found >= 0].reshape(frames, -1):
                assert torch.equal(frame, expected)

    @property_test
    @given(layouts(), st.integers(1, 3), st.integers(0, 9), st.sampled_from(METRICS))
    def test_distances_ignore_time(self, layout, frames, pointers, metric):
        """Brute force over all pairs of tokens; blocks may hold patches of two frames."""
        keys = dataclasses.replace(
            layout, num_prefix_tokens=0, num_suffix_tokens=pointers, frames=frames
        )
        found = layout.block_distance(metric, keys)
        assert found.shape == (layout.num_blocks, keys.num_blocks)
        (row, column), (key_row, key_column) = layout.coordinates, keys.coordinates
        down = (row[:, None] - key_row[None]).abs()
        across = (column[:, None] - key_column[None]).abs()
        gaps = {
            "chebyshev": torch.maximum(down, across),
            "l1": down + across,
            "axis": torch.minimum(down, across),
        }
        gap = gaps[metric].masked_fill((row < 0)[:, None] | (key_row < 0)[None], sum(layout.grid))
        expected = torch.full(found.shape, sum(layout.grid))
        for a in range(layout.num_blocks):
            for b in range(keys.num_blocks):
                expected[a, b] = gap[layout.block_of == a][:, keys.block_of == b].min()
        assert torch.equal(found, expected)

    def test_bad_frames(self):
        with pytest.raises(ValueError, match=r"frames=0: expected an integer >= 1"):
            TokenLayout((4, 4), frames=0)


class TestPatternsAmongFrames:
    LAYOUT = TokenLayout((8, 12), order="tile", tile=(4, 4), block_size=16)
    KEYS = TokenLayout(
        (8, 12), order="tile", tile=(4, 4), block_size=16, frames=3, num_suffix_tokens=5
    )

    @pytest.mark.parametrize("spec", ["special", "dense", "local_window", "axial"])
    def test_every_frame_has_the_mask_of_the_image(self, spec):
        mask, image = Pattern(spec)(self.LAYOUT, keys=self.KEYS), Pattern(spec)(self.LAYOUT)
        assert mask.shape == (6, 19)
        assert mask[:, -1].all()  # pointers
        for frame in mask[:, :-1].split(6, dim=1):
            assert torch.equal(frame, image)

    def test_joined(self):
        near, axial = Pattern("local_window", radius=2), Pattern("axial")
        found, a, b = (p(self.LAYOUT, keys=self.KEYS) for p in (near & axial, near, axial))
        assert torch.equal(found, a & b)

    @pytest.mark.parametrize("name", ["nearest", "strided", "random_blocks", "window"])
    def test_other_patterns_raise(self, name):
        with pytest.raises(
            ValueError,
            match=f"pattern '{name}' needs keys that are the queries' tokens: .* local_window",
        ):
            Pattern(name)(self.LAYOUT, keys=self.KEYS)

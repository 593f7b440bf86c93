from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_vision.masks import (
    PATTERNS,
    Pattern,
    TokenLayout,
    axial,
    dense,
    draw,
    local_window,
    nearest,
    random_blocks,
    region,
    special,
    stack_heads,
    strided,
    window,
    window_is_exact,
)
from tests.helpers.oracles_masks import Blocks, kept, layouts

property_test = settings(max_examples=50, deadline=None)

METRICS = ("chebyshev", "l1", "axis")
LAYOUT = TokenLayout(
    (9, 13), num_prefix_tokens=1, num_suffix_tokens=2, order="tile", tile=(3, 4), block_size=10
)
PLAIN = TokenLayout((9, 13), block_size=10)
TILED = TokenLayout((12, 16), order="tile", tile=(3, 4), block_size=12)  # every block a tile

# One set of parameters for each pattern, none of them the defaults.
EXAMPLES = {
    "dense": {},
    "special": {},
    "local_window": {"radius": 2, "metric": "l1"},
    "axial": {"width": 1},
    "nearest": {"sparsity": 0.7, "metric": "l1"},
    "strided": {"stride": 3},
    "random_blocks": {"sparsity": 0.6, "seed": 4},
    "region": {"centers": [[1, 2], [7, 11]], "radius": 3},
    "prompt_region": {"radius": 3, "near": 1},
    "window": {"size": 4, "shift": 2},
}


def same(mask: torch.Tensor, expected: np.ndarray) -> bool:
    assert mask.dtype == torch.bool
    assert mask.device.type == "cpu"
    return np.array_equal(mask.numpy(), expected)


def shares_window(blocks: Blocks, size: int, shift: int) -> np.ndarray:
    """Return which pairs of patches have no window boundary between them, (N, N).

    Boundaries are before patches shift, shift +- size, ...
    """
    boundaries = [b for b in range(1, 64) if (b - shift) % size == 0]
    row, column = (
        np.array([sum(b <= x for b in boundaries) for x in axis]) for axis in blocks.rows_columns
    )
    return (row[:, None] == row) & (column[:, None] == column)


class TestAgainstBruteForce:
    def test_every_pattern_has_an_example(self):
        assert set(EXAMPLES) == set(PATTERNS)

    @property_test
    @given(layouts())
    def test_dense_and_special(self, layout):
        blocks = Blocks.of(layout)
        assert same(dense(layout), np.ones((blocks.count, blocks.count), dtype=bool))
        assert same(special(layout), blocks.keep_special(np.eye(blocks.count, dtype=bool)))

    @pytest.mark.parametrize("metric", METRICS)
    @property_test
    @given(layout=layouts(), radius=st.integers(0, 30))
    def test_local_window(self, metric, layout, radius):
        assert same(local_window(layout, radius, metric), Blocks.of(layout).within(radius, metric))

    def test_local_window_radius_counts(self):
        """Twin: another radius, metric or order gives another mask."""
        blocks = Blocks.of(PLAIN)
        mask = local_window(PLAIN, 3)
        assert same(mask, blocks.within(3, "chebyshev"))
        for radius, metric in ((2, "chebyshev"), (4, "chebyshev"), (3, "l1"), (3, "axis")):
            assert not same(mask, blocks.within(radius, metric))
        tiles = dataclasses.replace(PLAIN, order="tile", tile=(3, 4))
        assert not same(local_window(tiles, 3), blocks.within(3, "chebyshev"))

    @property_test
    @given(layout=layouts(), width=st.integers(0, 12))
    def test_axial(self, layout, width):
        blocks = Blocks.of(layout)
        row, column = blocks.rows_columns
        cross = (abs(row[:, None] - row) <= width) | (abs(column[:, None] - column) <= width)
        assert same(axial(layout, width), blocks.any_rule(cross))

    def test_axial_width_counts(self):
        """Twin: with one patch per block, every width gives another mask."""
        layout = TokenLayout((6, 8), block_size=1)
        kept_blocks = [int(axial(layout, width).sum()) for width in range(6)]
        assert len(set(kept_blocks)) == 6
        assert kept_blocks[0] == 48 * (6 + 8 - 1)

    @pytest.mark.parametrize("metric", METRICS)
    @property_test
    @given(layout=layouts(), sparsity=st.floats(0, 1))
    def test_nearest(self, metric, layout, sparsity):
        blocks = Blocks.of(layout)
        k = kept(sparsity, blocks.count)
        expected = blocks.keep_special(blocks.nearest(k, metric=metric))
        assert same(nearest(layout, sparsity, metric), expected)
        if not blocks.special.any():
            assert expected.sum(1).tolist() == [k] * blocks.count

    def test_nearest_breaks_ties(self):
        """Twin: without centroids or indices as tie-breakers the masks differ."""
        blocks = Blocks.of(PLAIN)
        distance = blocks.distance()

        def rank(*keys):
            mask = np.zeros_like(distance, dtype=bool)
            for row in range(blocks.count):
                values = [[key(row, column) for key in keys] for column in range(blocks.count)]
                order = sorted(range(blocks.count), key=values.__getitem__)
                mask[row, order[: kept(0.7, blocks.count)]] = True
            return mask

        def by_distance(row, column):
            return distance[row, column]

        def by_index(row, column):
            return column

        assert same(nearest(PLAIN, 0.7), rank(by_distance, blocks.centroid_distance, by_index))
        assert not same(nearest(PLAIN, 0.7), rank(by_distance, by_index))
        assert not same(nearest(PLAIN, 0.7), rank(blocks.centroid_distance, by_index))
        # Equal tiles: four neighbours are at the same distance, and two of them are kept.
        board = TokenLayout((6, 6), order="tile", tile=(2, 2), block_size=4)
        middle = nearest(board, 1 - 3 / 9)[4]
        assert middle.nonzero().flatten().tolist() == [1, 3, 4]

    @property_test
    @given(layout=layouts(), stride=st.integers(1, 9))
    def test_strided(self, layout, stride):
        blocks = Blocks.of(layout)
        columns = np.zeros((blocks.count, blocks.count), dtype=bool)
        columns[:, ::stride] = True
        assert same(strided(layout, stride), blocks.keep_special(columns))

    @property_test
    @given(layout=layouts(), radius=st.integers(0, 12), data=st.data())
    def test_region(self, layout, radius, data):
        sides = [st.integers(0, side - 1) for side in layout.grid]
        centers = data.draw(st.lists(st.tuples(*sides), max_size=3))
        blocks = Blocks.of(layout)
        focus = blocks.focus(centers, radius)
        assert same(region(layout, centers, radius), blocks.any_rule(focus[:, None] & focus))

    def test_region_metric_radius_and_centers_count(self):
        mask = region(PLAIN, [(2, 3)], 3)
        others = [
            region(PLAIN, [(2, 3)], 3, "chebyshev"),
            region(PLAIN, [(2, 3)], 5),
            region(PLAIN, [(2, 3), (8, 12)], 3),
            region(PLAIN, [], 3),
            region(PLAIN, [(3, 2)], 3),
        ]
        assert not any(torch.equal(mask, other) for other in others)
        assert not others[3].any()

    @property_test
    @given(layout=layouts(), size=st.integers(1, 20), shift=st.integers(0, 25))
    def test_window(self, layout, size, shift):
        blocks = Blocks.of(layout)
        expected = blocks.any_rule(shares_window(blocks, size, shift))
        assert same(window(layout, size, shift), expected)

    @property_test
    @given(layout=layouts(), size=st.integers(1, 20), shift=st.integers(0, 25))
    def test_window_is_exact(self, layout, size, shift):
        """Brute force over all pairs of patches."""
        blocks = Blocks.of(layout)
        of_block = layout.block_of.numpy()
        computed = window(layout, size, shift).numpy()[of_block][:, of_block]
        patches = ~blocks.special_tokens
        pairs = patches[:, None] & patches
        wanted = shares_window(blocks, size, shift)
        assert not (wanted & pairs & ~computed).any()
        exact = np.array_equal(computed[pairs], wanted[pairs])
        assert window_is_exact(layout, size, shift) == exact

    def test_labels_name_windows_and_nothing_else(self):
        windows = Pattern("window", size=4) | Pattern("window", size=4, shift=2)
        swin = windows | Pattern("strided", stride=3)
        exact, cover = swin.labels(TokenLayout((8, 12), order="tile", tile=(4, 4), block_size=16))
        assert exact == "window(size=4) is exact: every block lies in one window"
        assert cover.startswith("window(size=4, shift=2) is a cover (any-rule)")
        assert Pattern("local_window").labels(PLAIN) == []

    def test_windows_are_exact_if_each_is_a_block(self):
        layout = TokenLayout((8, 12), order="tile", tile=(4, 4), block_size=16)
        assert torch.equal(window(layout, 4), torch.eye(6, dtype=torch.bool))
        assert torch.equal(window(layout, 4, shift=4), window(layout, 4))
        assert not torch.equal(window(layout, 4, shift=2), window(layout, 4))

    def test_shifted_windows_move_boundaries_and_do_not_wrap(self):
        row = TokenLayout((1, 10), block_size=1)
        groups = [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]  # boundaries before 1, 5, 9
        expected = np.array(groups)[:, None] == np.array(groups)
        assert same(window(row, 4, shift=1), expected)
        assert same(window(row, 4, shift=5), expected)
        assert not window(row, 4, shift=1)[0, 9]
        assert not same(window(row, 4, shift=3), expected)

    @property_test
    @given(
        layout=layouts(),
        sparsity=st.floats(0, 1),
        seed=st.integers(0, 2**40),
        stream=st.integers(0, 200),
    )
    def test_random_blocks(self, layout, sparsity, seed, stream):
        blocks = Blocks.of(layout)
        mask = random_blocks(layout, sparsity, seed, stream)
        assert torch.equal(mask, random_blocks(layout, sparsity, seed, stream))
        assert mask.diagonal().all()
        k = kept(sparsity, blocks.count)
        specials = int(blocks.special.sum())
        for row, count in enumerate(mask[:, ~torch.from_numpy(blocks.special)].sum(1).tolist()):
            if blocks.special[row]:
                assert count == blocks.count - specials
            else:
                assert k - specials <= count <= k
        assert torch.equal(mask, mask | special(layout))


class TestRandomBlocks:
    def test_seeds_and_streams_differ(self):
        layout = TokenLayout((16, 16), block_size=8)
        draws = [
            random_blocks(layout, 0.5, seed, stream) for seed in range(4) for stream in range(8)
        ]
        assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)

    def test_every_other_block_is_as_likely(self):
        layout = TokenLayout((6, 6), block_size=4)
        draws = [random_blocks(layout, 0.5, 0, stream) for stream in range(2000)]
        share = torch.stack(draws).double().mean(0)
        others = share[~torch.eye(9, dtype=torch.bool)]
        assert (share.diagonal() == 1).all()
        assert (others - (kept(0.5, 9) - 1) / 8).abs().max() < 0.06

    def test_global_generator_is_not_used(self):
        before = torch.get_rng_state()
        first = random_blocks(PLAIN)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        assert torch.equal(random_blocks(PLAIN), first)

    def test_default_dtype_does_not_change_the_draw(self):
        first = random_blocks(PLAIN)
        torch.set_default_dtype(torch.float64)
        try:
            again = random_blocks(PLAIN)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(again, first)


@pytest.mark.parametrize("name", PATTERNS)
class TestEveryPattern:
    @pytest.mark.parametrize(
        "layout", [LAYOUT, PLAIN, dataclasses.replace(LAYOUT, order="raster"), TokenLayout((1, 1))]
    )
    def test_special_rows_and_columns_are_kept(self, name, layout):
        params = EXAMPLES[name]
        if layout.grid == (1, 1) and name == "region":
            params = {"centers": [(0, 0)]}
        mask = PATTERNS[name](layout, **params)
        specials = torch.from_numpy(Blocks.of(layout).special)
        assert mask.shape == (layout.num_blocks, layout.num_blocks)
        assert mask.dtype == torch.bool
        assert mask[specials].all()
        assert mask[:, specials].all()

    def test_blocks_are_skipped_without_special_tokens(self, name):
        """Twin of the test above: all patterns except `dense` skip blocks."""
        assert PATTERNS[name](TILED, **EXAMPLES[name]).all() == (name == "dense")

    def test_default_device(self, name):
        expected = PATTERNS[name](LAYOUT, **EXAMPLES[name])
        with torch.device("meta"):
            mask = PATTERNS[name](LAYOUT, **EXAMPLES[name])
        assert mask.device.type == "cpu"
        assert torch.equal(mask, expected)

    def test_results_are_not_shared(self, name):
        mask = PATTERNS[name](LAYOUT, **EXAMPLES[name])
        expected = mask.clone()
        mask.logical_not_()
        assert torch.equal(PATTERNS[name](LAYOUT, **EXAMPLES[name]), expected)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: local_window(LAYOUT, -1), r"radius=-1: expected an integer >= 0"),
        (lambda: local_window(LAYOUT, 2.5), r"radius=2\.5: expected an integer >= \d"),
        (lambda: local_window(LAYOUT, True), r"radius=True: expected an integer >= \d"),
        (lambda: local_window(LAYOUT, 2, "l2"), r"metric='l2': allowed are .*"),
        (lambda: axial(LAYOUT, -1), r"width=-1: expected an integer >= 0"),
        (lambda: nearest(LAYOUT, 1.01), r"sparsity=1\.01: .*of blocks to skip, 0 to 1"),
        (lambda: nearest(LAYOUT, -0.5), r"sparsity=-0\.5: .*of blocks to skip, 0 to 1"),
        (lambda: nearest(LAYOUT, float("nan")), r"sparsity=nan: .*of blocks to skip, 0 to 1"),
        (lambda: nearest(LAYOUT, "0.5"), r"sparsity='0\.5': .*of blocks to skip, 0 to 1"),
        (lambda: nearest(LAYOUT, 0.5, "l2"), r"metric='l2': allowed are .*"),
        (lambda: strided(LAYOUT, 0), r"stride=0: expected an integer >= 1"),
        (lambda: random_blocks(LAYOUT, 2), r"sparsity=2: .*of blocks to skip, 0 to 1"),
        (lambda: random_blocks(LAYOUT, 0.5, -1), r"seed=-1: expected an integer >= 0"),
        (lambda: random_blocks(LAYOUT, 0.5, 1.0), r"seed=1\.0: expected an integer >= \d"),
        (
            lambda: region(LAYOUT, [(9, 0)]),
            r"\(9, 0\) lies outside the grid of 9 x 13 .*0 to 8.*0 to 12; divide",
        ),
        (
            lambda: region(LAYOUT, [(0, 13)]),
            r"\(0, 13\) lies outside the grid of 9 x 13 .*0 to 8.*0 to 12; divide",
        ),
        (lambda: region(LAYOUT, [(0, -1)]), r"-1: expected an integer >= 0"),
        (lambda: region(LAYOUT, [(0, 1, 2)]), r"\(0, 1, 2\): expected a pair"),
        (lambda: region(LAYOUT, [(0, 1)], -3), r"radius=-3: expected an integer >= 0"),
        (lambda: region(LAYOUT, [(0, 1)], 3, "l2"), r"metric='l2': allowed are .*"),
        (lambda: window(LAYOUT, 0), r"size=0: expected an integer >= 1"),
        (lambda: window(LAYOUT, 7, -1), r"shift=-1: expected an integer >= 0"),
    ],
)
def test_bad_parameters(call, match):
    with pytest.raises(ValueError, match=match):
        call()


class TestStackHeads:
    def test_one_slice_per_head(self):
        heads = [local_window(PLAIN, radius) for radius in range(3)]
        base = stack_heads(heads, 2)
        assert base.shape == (2, 3, PLAIN.num_blocks, PLAIN.num_blocks)
        assert base.dtype == torch.bool
        assert base.is_contiguous()
        for image in base:
            assert all(map(torch.equal, image, heads))

    def test_images_do_not_share_memory(self):
        base = stack_heads([local_window(PLAIN, 0)], 2)
        base[0] = True
        assert not base[1].all()

    def test_device(self):
        with torch.device("meta"):
            assert stack_heads([dense(PLAIN)], 1).device.type == "meta"
            assert stack_heads([dense(PLAIN)], 1, "cpu").device.type == "cpu"
        assert stack_heads([dense(PLAIN)], 1, torch.device("meta")).device.type == "meta"

    @pytest.mark.parametrize("batch_size", [0, -1, 1.0, True, None])
    def test_bad_batch_size(self, batch_size):
        with pytest.raises(ValueError, match=f"batch_size={batch_size}: expected an integer >= 1"):
            stack_heads([dense(PLAIN)], batch_size)


class TestDraw:
    def test_one_character_pair_per_block(self):
        mask = torch.tensor([[True, False, False], [False, True, True]])
        assert draw(mask) == "██    \n  ████"

    def test_larger_masks_are_averaged(self):
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[:4, :4] = True  # all
        mask[:2, 4:] = True  # half
        mask[4, 0] = True  # one of sixteen
        mask[4:7, 4:] = True  # three quarters
        assert draw(mask, max_size=2) == "██▒▒\n░░▓▓"

    @pytest.mark.parametrize(("rows", "columns"), [(40, 40), (33, 5), (3, 100), (65, 47)])
    def test_sizes_and_extremes(self, rows, columns):
        size = (min(rows, 32), min(columns, 32))
        for value, shade in ((True, "█"), (False, " ")):
            lines = [shade * 2 * size[1]] * size[0]
            assert draw(torch.full((rows, columns), value)) == "\n".join(lines)

    def test_a_single_kept_block_stays_visible(self):
        mask = torch.zeros(200, 200, dtype=torch.bool)
        mask[77, 140] = True
        assert set(draw(mask)) == {" ", "░", "\n"}

    def test_empty(self):
        assert draw(torch.zeros(0, 4, dtype=torch.bool)) == ""

    @pytest.mark.parametrize("shape", [(4,), (1, 4, 4), (1, 2, 4, 4)])
    def test_wrong_rank(self, shape):
        text = re.escape(f"mask of shape {shape}: expected (R, C); pick")
        with pytest.raises(ValueError, match=text):
            draw(torch.ones(shape, dtype=torch.bool))

from __future__ import annotations

import copyreg
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_vision.masks import TokenLayout
from bsa_vision.masks import layout as layout_module
from tests.helpers.oracles_masks import Blocks, layouts, model_order, packed_order

METRICS = ("chebyshev", "l1", "axis")
# Blocks of 10 tokens and tiles of 8: blocks straddle tiles.
STRADDLING = TokenLayout(
    (7, 11), num_prefix_tokens=1, num_suffix_tokens=2, order="tile", tile=(2, 4), block_size=10
)

property_test = settings(max_examples=50, deadline=None)


@pytest.fixture
def cold_caches():
    """Clear the caches before and after a test."""
    caches = [value for value in vars(layout_module).values() if hasattr(value, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def everything(layout: TokenLayout) -> dict[str, torch.Tensor]:
    """Return every tensor of a layout."""
    row, column = layout.coordinates
    return {
        "permutation": layout.permutation,
        "inverse": layout.inverse,
        "row": row,
        "column": column,
        "block_of": layout.block_of,
        "special_blocks": layout.special_blocks,
        "centroid_distance": layout.centroid_distance(),
        "distance_to_patch": layout.distance_to_patch(0, 0),
        **{metric: layout.block_distance(metric) for metric in METRICS},
    }


class TestOrder:
    @property_test
    @given(layouts())
    def test_permutation_and_inverse_undo_each_other(self, layout):
        tokens = torch.arange(layout.num_tokens)
        assert layout.permutation.dtype == layout.inverse.dtype == torch.int64
        assert torch.equal(layout.permutation.sort().values, tokens)
        assert torch.equal(layout.permutation[layout.inverse], tokens)
        assert torch.equal(layout.inverse[layout.permutation], tokens)
        features = torch.randn(layout.num_tokens, 3)
        assert torch.equal(features[layout.permutation][layout.inverse], features)

    @property_test
    @given(layouts(orders=["raster"]))
    def test_raster_is_model_order(self, layout):
        assert torch.equal(layout.permutation, torch.arange(layout.num_tokens))
        assert torch.equal(layout.inverse, torch.arange(layout.num_tokens))
        assert layout.is_identity

    @property_test
    @given(layouts())
    def test_permutation_equals_sorting_one_by_one(self, layout):
        assert layout.permutation.tolist() == packed_order(layout)
        assert layout.is_identity == (packed_order(layout) == list(range(layout.num_tokens)))

    @property_test
    @given(layouts(orders=["tile"]))
    def test_tile_order_full_tiles_then_ragged_ones_then_specials(self, layout):
        tokens = model_order(layout.grid, layout.num_prefix_tokens, layout.num_suffix_tokens)
        packed = [tokens[index] for index in layout.permutation.tolist()]
        num_special = layout.num_prefix_tokens + layout.num_suffix_tokens
        assert packed[layout.num_patches :] == [None] * num_special
        (height, width), (tile_h, tile_w) = layout.grid, layout.tile
        full_rows, full_columns = height // tile_h, width // tile_w
        tile_size = tile_h * tile_w
        for number in range(full_rows * full_columns):
            top, left = number // full_columns * tile_h, number % full_columns * tile_w
            raster = [
                (top + row, left + column) for row in range(tile_h) for column in range(tile_w)
            ]
            assert packed[number * tile_size : (number + 1) * tile_size] == raster
        for row, column in packed[full_rows * full_columns * tile_size : layout.num_patches]:
            assert row >= full_rows * tile_h or column >= full_columns * tile_w

    def test_special_tokens_keep_their_order_at_the_end(self):
        special = dict(num_prefix_tokens=2, num_suffix_tokens=3)
        layout = TokenLayout((2, 3), **special, order="tile", tile=(2, 2))
        assert layout.permutation.tolist() == [2, 3, 5, 6, 4, 7, 0, 1, 8, 9, 10]

    def test_full_tiles_fill_blocks(self):
        layout = TokenLayout((64, 64), num_prefix_tokens=5, order="tile")
        row, column = (axis[: 64 * 64].reshape(32, 128) for axis in layout.coordinates)
        assert layout.num_blocks == 33
        for axis, side in ((row, 8), (column, 16)):
            assert (axis.amax(1) - axis.amin(1)).tolist() == [side - 1] * 32
        assert layout.special_blocks.tolist() == [False] * 32 + [True]

    @pytest.mark.parametrize(
        ("layout", "identity"),
        [
            (TokenLayout((4, 6), num_prefix_tokens=3, num_suffix_tokens=2), True),
            (TokenLayout((4, 6), order="tile", tile=(2, 3)), False),
            (TokenLayout((4, 6), order="tile", tile=(2, 6)), True),  # a tile as wide as the grid
            (TokenLayout((4, 6), order="tile", tile=(9, 9)), True),  # one ragged tile
            (TokenLayout((4, 6), num_suffix_tokens=1, order="tile", tile=(2, 6)), True),
            # CLS moves to the end.
            (TokenLayout((4, 6), num_prefix_tokens=1, order="tile", tile=(2, 6)), False),
            (TokenLayout((4, 6), order="tile", tile=(1, 1)), True),
        ],
    )
    def test_is_identity(self, layout, identity):
        assert layout.is_identity is identity
        assert torch.equal(layout.permutation, torch.arange(layout.num_tokens)) is identity


class TestContents:
    @property_test
    @given(layouts())
    def test_counts_coordinates_and_special_blocks(self, layout):
        blocks = Blocks.of(layout)
        assert layout.num_patches == layout.grid[0] * layout.grid[1]
        assert layout.num_tokens == len(blocks.positions)
        assert layout.num_blocks == blocks.count
        row, column = layout.coordinates
        expected = [(-1, -1) if position is None else position for position in blocks.positions]
        assert list(zip(row.tolist(), column.tolist(), strict=True)) == expected
        assert layout.block_of.tolist() == [
            i // layout.block_size for i in range(layout.num_tokens)
        ]
        assert layout.special_blocks.dtype == torch.bool
        assert layout.special_blocks.tolist() == blocks.special.tolist()


class TestBlockDistance:
    @pytest.mark.parametrize("metric", METRICS)
    @property_test
    @given(layout=layouts())
    def test_equals_brute_force(self, metric, layout):
        distance, blocks = layout.block_distance(metric), Blocks.of(layout)
        assert distance.dtype == torch.int64
        assert np.array_equal(distance.numpy(), blocks.distance(metric))
        assert torch.equal(distance, distance.T)
        for block, content in enumerate(blocks.contents):
            if any(position is not None for position in content):
                assert distance[block, block] == 0
            else:
                assert distance[block].tolist() == [sum(layout.grid)] * layout.num_blocks

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize(
        "layout",
        [
            TokenLayout(
                (29, 41), num_prefix_tokens=1, block_size=1
            ),  # several chunks of rectangles
            TokenLayout((29, 41), order="tile", tile=(3, 2), block_size=7),
            TokenLayout((32, 33), num_prefix_tokens=5, order="tile"),
            STRADDLING,
            TokenLayout((1, 1)),
            TokenLayout((1, 17), num_prefix_tokens=3, num_suffix_tokens=4, block_size=3),
            TokenLayout((12, 1), order="tile", block_size=5),
        ],
        ids=repr,
    )
    def test_equals_brute_force_on_chosen_layouts(self, layout, metric):
        assert np.array_equal(
            layout.block_distance(metric).numpy(), Blocks.of(layout).distance(metric)
        )

    def test_blocks_without_patches(self):
        layout = TokenLayout((3, 4), num_prefix_tokens=2, num_suffix_tokens=3, block_size=2)
        for metric in METRICS:
            distance = layout.block_distance(metric)
            assert distance[0].tolist() == [7] * layout.num_blocks
            assert distance[:, -1].tolist() == [7] * layout.num_blocks
            assert distance[1, 1] == 0

    def test_metrics_and_orders_differ(self):
        """Twin: other metrics, orders or tiles give other distances."""
        tile = TokenLayout((11, 14), order="tile", tile=(2, 4), block_size=10)
        changes = ({"order": "raster"}, {}, {"tile": (4, 2)})
        matrices = []
        for layout in (dataclasses.replace(tile, **change) for change in changes):
            for metric in METRICS:
                distance = layout.block_distance(metric)
                assert np.array_equal(distance.numpy(), Blocks.of(layout).distance(metric))
                matrices.append(distance)
        for i, first in enumerate(matrices):
            assert not any(torch.equal(first, second) for second in matrices[i + 1 :])

    def test_default_metric_is_chebyshev(self):
        assert torch.equal(STRADDLING.block_distance(), STRADDLING.block_distance("chebyshev"))

    @property_test
    @given(layouts())
    def test_centroid_distance_equals_fractions(self, layout):
        blocks = Blocks.of(layout)
        expected = [
            [float(blocks.centroid_distance(a, b)) for b in range(blocks.count)]
            for a in range(blocks.count)
        ]
        torch.testing.assert_close(
            layout.centroid_distance(), torch.tensor(expected, dtype=torch.float64)
        )

    @pytest.mark.parametrize("metric", METRICS)
    @property_test
    @given(layout=layouts(), data=st.data())
    def test_distance_to_patch(self, metric, layout, data):
        row, column = (data.draw(st.integers(0, side - 1)) for side in layout.grid)
        blocks = Blocks.of(layout)
        to_token = blocks.token_distance(metric)[blocks.positions.index((row, column))]
        expected = np.minimum.reduceat(to_token, np.arange(0, layout.num_tokens, layout.block_size))
        assert layout.distance_to_patch(row, column, metric).tolist() == expected.tolist()

    @pytest.mark.parametrize("metric", METRICS)
    @property_test
    @given(layout=layouts(), data=st.data())
    def test_distance_to_box(self, metric, layout, data):
        """The distance to a box is the smallest distance to one of its patches."""
        (top, bottom), (left, right) = (
            sorted(data.draw(st.lists(st.integers(0, side - 1), min_size=2, max_size=2)))
            for side in layout.grid
        )
        patches = [
            (row, column) for row in range(top, bottom + 1) for column in range(left, right + 1)
        ]
        expected = torch.stack(
            [layout.distance_to_patch(*patch, metric) for patch in patches]
        ).amin(0)
        assert torch.equal(layout.distance_to_box(top, left, bottom, right, metric), expected)

    def test_bad_boxes(self):
        layout = TokenLayout((6, 8))
        with pytest.raises(
            ValueError, match=r"patch \(6, 2\) lies outside the grid of 6 x 8 patches"
        ):
            layout.distance_to_box(1, 1, 6, 2)
        with pytest.raises(
            ValueError,
            match=r"box of patches \(3, 1\) to \(2, 2\) is empty: expected top <= bottom",
        ):
            layout.distance_to_box(3, 1, 2, 2)

    def test_distance_to_patch_default_is_l1(self):
        layout = TokenLayout((6, 6), block_size=1)
        assert layout.distance_to_patch(1, 2)[layout.inverse[5 * 6 + 5]] == 4 + 3


class TestValue:
    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            STRADDLING.num_prefix_tokens = 3
        with pytest.raises(dataclasses.FrozenInstanceError):
            del STRADDLING.grid

    @pytest.mark.parametrize(
        "change",
        [
            {"grid": (11, 7)},
            {"num_prefix_tokens": 2},
            {"num_suffix_tokens": 1},
            {"order": "raster"},
            {"tile": (4, 2)},
            {"block_size": 11},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_equality_and_hash_see_every_field(self, change):
        twin = dataclasses.replace(STRADDLING)
        assert twin is not STRADDLING
        assert twin == STRADDLING
        assert hash(twin) == hash(STRADDLING)
        assert dataclasses.replace(STRADDLING, **change) != STRADDLING
        assert {STRADDLING: 1, dataclasses.replace(STRADDLING, **change): 2}[twin] == 1

    def test_pickles_with_the_attributes_start_and_end(self):
        old = copyreg.__newobj__(TokenLayout)
        state = {**vars(STRADDLING)}
        state["start"] = state.pop("num_prefix_tokens")
        state["end"] = state.pop("num_suffix_tokens")
        old.__setstate__(state)
        assert old == STRADDLING
        assert old.num_prefix_tokens == STRADDLING.num_prefix_tokens > 0

    def test_pickle(self):
        STRADDLING.block_distance()
        copy = pickle.loads(pickle.dumps(STRADDLING))
        assert copy == STRADDLING
        assert hash(copy) == hash(STRADDLING)
        assert torch.equal(copy.permutation, STRADDLING.permutation)
        assert len(pickle.dumps(STRADDLING)) < 1000  # without the tensors

    @pytest.mark.parametrize("grid", [[7, 11], torch.Size([7, 11]), (np.int64(7), np.int32(11))])
    def test_grid_may_be_any_pair_of_integers(self, grid):
        special = dict(num_prefix_tokens=np.int64(1), num_suffix_tokens=2)
        layout = TokenLayout(grid, **special, order="tile", tile=[2, 4], block_size=np.int64(10))
        assert layout == STRADDLING
        assert hash(layout) == hash(STRADDLING)
        assert pickle.dumps(layout) == pickle.dumps(dataclasses.replace(STRADDLING))

    def test_defaults(self):
        defaults = dict(num_prefix_tokens=0, num_suffix_tokens=0, order="raster", tile=(8, 16))
        assert TokenLayout((3, 5)) == TokenLayout((3, 5), **defaults, block_size=128)

    def test_only_the_grid_is_positional(self):
        with pytest.raises(TypeError):
            TokenLayout((3, 5), 1)


class TestEnvironment:
    """The tensors of a layout do not depend on torch's global state."""

    @pytest.fixture
    def expected(self, cold_caches):
        tensors = {key: value.clone() for key, value in everything(STRADDLING).items()}
        for value in vars(layout_module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
        return tensors

    def same(self, expected):
        for key, value in everything(STRADDLING).items():
            assert value.device.type == "cpu", key
            assert value.dtype == expected[key].dtype, key
            assert torch.equal(value, expected[key]), key

    def test_default_device(self, expected):
        with torch.device("meta"):
            self.same(expected)
            assert not STRADDLING.is_identity
        self.same(expected)

    def test_default_dtype(self, expected):
        torch.set_default_dtype(torch.float64)
        try:
            self.same(expected)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_inference_mode(self, expected):
        """A layout that is cached in inference mode can be used in training."""
        with torch.inference_mode():
            self.same(expected)
        features = torch.randn(STRADDLING.num_tokens, 2, requires_grad=True)
        features[STRADDLING.permutation][STRADDLING.inverse].square().sum().backward()
        assert torch.equal(features.grad, 2 * features)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"grid": (0, 5)}, r"grid\[0\]=0: expected an integer >= 1"),
            ({"grid": (5, -1)}, r"grid\[1\]=-1: expected an integer >= 1"),
            ({"grid": (5, 2.0)}, r"grid\[1\]=2\.0: expected an integer >= \d"),
            ({"grid": (True, 5)}, r"grid\[0\]=True: expected an integer >= \d"),
            ({"grid": (5,)}, r"grid=\(5,\): expected a pair \(rows, columns\)"),
            ({"grid": (5, 6, 7)}, r"grid=\(5, 6, 7\): expected a pair \(rows, columns\)"),
            ({"grid": 5}, r"grid=5: expected a pair \(rows, columns\)"),
            ({"grid": "56"}, r"grid='56': expected a pair \(rows, columns\)"),
            ({"grid": None}, r"grid=None: expected a pair \(rows, columns\)"),
            ({"num_prefix_tokens": -1}, r"num_prefix_tokens=-1: expected an integer >= 0"),
            ({"num_prefix_tokens": True}, r"num_prefix_tokens=True: expected an integer >= \d"),
            ({"num_suffix_tokens": 1.5}, r"num_suffix_tokens=1\.5: expected an integer >= \d"),
            ({"tile": (8, 0)}, r"tile\[1\]=0: expected an integer >= 1"),
            ({"tile": 8}, r"tile=8: expected a pair \(rows, columns\)"),
            ({"block_size": 0}, r"block_size=0: expected an integer >= 1"),
            ({"block_size": 128.0}, r"block_size=128\.0: expected an integer >= \d"),
            ({"block_size": "128"}, r"block_size='128': expected an integer >= \d"),
            ({"order": "hilbert"}, r"order='hilbert': allowed are 'raster', 'tile'"),
            ({"order": None}, r"order=None: allowed are 'raster', 'tile'"),
        ],
        ids=str,
    )
    def test_construction(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            TokenLayout(**{"grid": (5, 6), **arguments})

    @pytest.mark.parametrize("metric", ["euclidean", "L1", None])
    def test_metric_of_block_distance(self, metric):
        with pytest.raises(
            ValueError, match=f"metric={metric!r}: allowed are 'chebyshev', 'l1', 'axis'"
        ):
            STRADDLING.block_distance(metric)

    @pytest.mark.parametrize("metric", ["euclidean", "L1", None])
    def test_metric_of_distance_to_patch(self, metric):
        with pytest.raises(
            ValueError, match=f"metric={metric!r}: allowed are 'chebyshev', 'l1', 'axis'"
        ):
            STRADDLING.distance_to_patch(0, 0, metric)

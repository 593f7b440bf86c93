from __future__ import annotations

import copyreg
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.masks import layout as layout_module
from tests.helpers.oracles_masks import Blocks, layouts, model_order, packed_order

METRICS = ("chebyshev", "l1", "axis")
STRADDLING = TokenLayout(
    (7, 11), num_prefix_tokens=1, num_suffix_tokens=2, order="tile", tile=(2, 4), block_size=10
)  # blocks straddle tiles

property_test = settings(max_examples=50, deadline=None)


@pytest.fixture
def cold_caches():
    """Nothing remembered from other tests, nothing left for them."""
    caches = [value for value in vars(layout_module).values() if hasattr(value, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def everything(layout: TokenLayout) -> dict[str, torch.Tensor]:
    """Every tensor a layout hands out."""
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
        assert packed[layout.num_patches :] == [None] * (
            layout.num_prefix_tokens + layout.num_suffix_tokens
        )
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

    def test_specials_keep_their_own_order_at_the_end(self):
        layout = TokenLayout(
            (2, 3), num_prefix_tokens=2, num_suffix_tokens=3, order="tile", tile=(2, 2)
        )
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
            (
                TokenLayout((4, 6), num_prefix_tokens=1, order="tile", tile=(2, 6)),
                False,
            ),  # CLS moves to the end
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
            ),  # more rectangles than are taken at a time
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
        """Twin: the oracle can tell metrics, orders and tiles apart."""
        tile = TokenLayout((11, 14), order="tile", tile=(2, 4), block_size=10)
        raster, other = (
            dataclasses.replace(tile, order="raster"),
            dataclasses.replace(tile, tile=(4, 2)),
        )
        matrices = [
            layout.block_distance(metric) for layout in (raster, tile, other) for metric in METRICS
        ]
        for i, first in enumerate(matrices):
            assert not any(torch.equal(first, second) for second in matrices[i + 1 :])
            assert np.array_equal(
                first.numpy(), Blocks.of((raster, tile, other)[i // 3]).distance(METRICS[i % 3])
            )

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
        """The nearest of its patches."""
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

    def test_boxes_that_are_none(self):
        layout = TokenLayout((6, 8))
        with pytest.raises(
            ValueError, match=r"patch \(6, 2\) lies outside the grid of 6 x 8 patches"
        ):
            layout.distance_to_box(1, 1, 6, 2)
        with pytest.raises(
            ValueError, match=r"box of patches \(3, 1\) to \(2, 2\) is empty: .*swap them"
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
        twin = TokenLayout(
            (7, 11),
            num_prefix_tokens=1,
            num_suffix_tokens=2,
            order="tile",
            tile=(2, 4),
            block_size=10,
        )
        assert twin == STRADDLING
        assert hash(twin) == hash(STRADDLING)
        assert dataclasses.replace(STRADDLING, **change) != STRADDLING
        assert {STRADDLING: 1, dataclasses.replace(STRADDLING, **change): 2}[twin] == 1

    def test_pickles_from_before_the_tokens_were_named(self):
        old = copyreg.__newobj__(TokenLayout)
        state = {**vars(STRADDLING)}
        state["start"], state["end"] = (
            state.pop("num_prefix_tokens"),
            state.pop("num_suffix_tokens"),
        )
        old.__setstate__(state)
        assert old == STRADDLING
        assert old.num_prefix_tokens == STRADDLING.num_prefix_tokens > 0

    def test_pickle(self):
        STRADDLING.block_distance()
        copy = pickle.loads(pickle.dumps(STRADDLING))
        assert copy == STRADDLING
        assert hash(copy) == hash(STRADDLING)
        assert torch.equal(copy.permutation, STRADDLING.permutation)
        assert len(pickle.dumps(STRADDLING)) < 1000  # the tensors stay behind

    @pytest.mark.parametrize("grid", [[7, 11], torch.Size([7, 11]), (np.int64(7), np.int32(11))])
    def test_grids_as_any_pair_of_whole_numbers(self, grid):
        layout = TokenLayout(
            grid,
            num_prefix_tokens=np.int64(1),
            num_suffix_tokens=2,
            order="tile",
            tile=[2, 4],
            block_size=np.int64(10),
        )
        assert layout == STRADDLING
        assert hash(layout) == hash(STRADDLING)
        assert pickle.dumps(layout) == pickle.dumps(
            TokenLayout(
                (7, 11),
                num_prefix_tokens=1,
                num_suffix_tokens=2,
                order="tile",
                tile=(2, 4),
                block_size=10,
            )
        )

    def test_defaults(self):
        assert TokenLayout((3, 5)) == TokenLayout(
            (3, 5),
            num_prefix_tokens=0,
            num_suffix_tokens=0,
            order="raster",
            tile=(8, 16),
            block_size=128,
        )

    def test_only_the_grid_is_positional(self):
        with pytest.raises(TypeError):
            TokenLayout((3, 5), 1)


class TestEnvironment:
    """What a layout hands out depends on nothing around it."""

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
        """A layout first met while predicting serves training as well."""
        with torch.inference_mode():
            self.same(expected)
        features = torch.randn(STRADDLING.num_tokens, 2, requires_grad=True)
        features[STRADDLING.permutation][STRADDLING.inverse].square().sum().backward()
        assert torch.equal(features.grad, 2 * features)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"grid": (0, 5)}, r"grid\[0\]=0: .*at least 1; give"),
            ({"grid": (5, -1)}, r"grid\[1\]=-1: .*at least 1; give"),
            ({"grid": (5, 2.0)}, r"grid\[1\]=2\.0: .*whole number.*; give"),
            ({"grid": (True, 5)}, r"grid\[0\]=True: .*whole number.*; give"),
            ({"grid": (5,)}, r"grid=\(5,\): .*pair \(rows, columns\); give"),
            ({"grid": (5, 6, 7)}, r"grid=\(5, 6, 7\): .*pair \(rows, columns\); give"),
            ({"grid": 5}, r"grid=5: .*pair \(rows, columns\); give"),
            ({"grid": "56"}, r"grid='56': .*pair \(rows, columns\); give"),
            ({"grid": None}, r"grid=None: .*pair \(rows, columns\); give"),
            ({"num_prefix_tokens": -1}, r"num_prefix_tokens=-1: .*at least 0; give"),
            ({"num_prefix_tokens": True}, r"num_prefix_tokens=True: .*whole number.*; give"),
            ({"num_suffix_tokens": 1.5}, r"num_suffix_tokens=1\.5: .*whole number.*; give"),
            ({"tile": (8, 0)}, r"tile\[1\]=0: .*at least 1; give"),
            ({"tile": 8}, r"tile=8: .*pair \(rows, columns\); give"),
            ({"block_size": 0}, r"block_size=0: .*at least 1; give"),
            ({"block_size": 128.0}, r"block_size=128\.0: .*whole number.*; give"),
            ({"block_size": "128"}, r"block_size='128': .*whole number.*; give"),
            ({"order": "hilbert"}, r"order='hilbert': allowed are 'raster', 'tile'; choose"),
            ({"order": None}, r"order=None: allowed are 'raster', 'tile'; choose"),
        ],
        ids=str,
    )
    def test_construction(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            TokenLayout(**{"grid": (5, 6), **arguments})

    @pytest.mark.parametrize("metric", ["euclidean", "L1", None])
    def test_metric_of_block_distance(self, metric):
        with pytest.raises(
            ValueError, match=f"metric={metric!r}: allowed are 'chebyshev', 'l1', 'axis'; choose"
        ):
            STRADDLING.block_distance(metric)

    @pytest.mark.parametrize("metric", ["euclidean", "L1", None])
    def test_metric_of_distance_to_patch(self, metric):
        with pytest.raises(
            ValueError, match=f"metric={metric!r}: allowed are 'chebyshev', 'l1', 'axis'; choose"
        ):
            STRADDLING.distance_to_patch(0, 0, metric)


class TestFrames:
    """What a video model remembers: frame after frame, then pointers."""

    @property_test
    @given(layouts(), st.integers(1, 4))
    def test_each_frame_is_ordered_as_one_image(self, layout, frames):
        one = dataclasses.replace(layout, num_prefix_tokens=0, num_suffix_tokens=0)
        many = dataclasses.replace(layout, frames=frames)
        assert many.num_patches == frames * one.num_patches
        assert (
            many.num_tokens
            == layout.num_prefix_tokens + many.num_patches + layout.num_suffix_tokens
        )
        patches = many.permutation[
            (many.permutation >= layout.num_prefix_tokens)
            & (many.permutation < layout.num_prefix_tokens + many.num_patches)
        ]
        for frame, inside in enumerate((patches - layout.num_prefix_tokens).split(one.num_patches)):
            assert torch.equal(inside - frame * one.num_patches, one.permutation)
        row, column = (place[place >= 0].reshape(frames, -1) for place in many.coordinates)
        assert all(torch.equal(row[frame], one.coordinates[0]) for frame in range(frames))
        assert all(torch.equal(column[frame], one.coordinates[1]) for frame in range(frames))

    @property_test
    @given(layouts(), st.integers(1, 3), st.integers(0, 9), st.sampled_from(METRICS))
    def test_distances_know_no_time(self, layout, frames, pointers, metric):
        """Against every pair of tokens; blocks may hold patches of two frames."""
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
        with pytest.raises(ValueError, match=r"frames=0: expected a whole number of at least 1"):
            TokenLayout((4, 4), frames=0)


class TestPatternsAmongFrames:
    LAYOUT = TokenLayout((8, 12), order="tile", tile=(4, 4), block_size=16)
    KEYS = TokenLayout(
        (8, 12), order="tile", tile=(4, 4), block_size=16, frames=3, num_suffix_tokens=5
    )

    @pytest.mark.parametrize("spec", ["special", "dense", "local_window", "axial"])
    def test_every_frame_is_seen_as_the_own_one(self, spec):
        mask, own = Pattern(spec)(self.LAYOUT, keys=self.KEYS), Pattern(spec)(self.LAYOUT)
        assert mask.shape == (6, 19)
        assert mask[:, -1].all()  # pointers
        for frame in mask[:, :-1].split(6, dim=1):
            assert torch.equal(frame, own)

    def test_joined(self):
        joined = Pattern("local_window", radius=2) & Pattern("axial")
        parts = [
            part(self.LAYOUT, keys=self.KEYS)
            for part in (Pattern("local_window", radius=2), Pattern("axial"))
        ]
        assert torch.equal(joined(self.LAYOUT, keys=self.KEYS), parts[0] & parts[1])

    @pytest.mark.parametrize("name", ["nearest", "strided", "random_blocks", "window"])
    def test_others_say_so(self, name):
        with pytest.raises(
            ValueError,
            match=f"pattern '{name}' is for keys that are the queries' own tokens: .* local_window",
        ):
            Pattern(name)(self.LAYOUT, keys=self.KEYS)

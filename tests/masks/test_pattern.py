"""`Pattern`: names, parameters, joints, plain data."""

from __future__ import annotations

import json

import pytest
import torch

from bsa_vision.masks import (
    PATTERNS,
    Pattern,
    random_blocks,
    strided,
)
from tests.masks.test_patterns import EXAMPLES, LAYOUT, PLAIN, TILED


class TestPattern:
    @pytest.mark.parametrize("name", PATTERNS)
    def test_equals_its_function(self, name):
        for layout in (LAYOUT, PLAIN):
            expected = PATTERNS[name](layout, **EXAMPLES[name])
            assert torch.equal(Pattern(name, **EXAMPLES[name])(layout), expected)

    @pytest.mark.parametrize("name", [name for name in PATTERNS if EXAMPLES[name]])
    def test_parameters_are_used(self, name):
        """Twin: the defaults (for regions, other centers) give another mask."""
        params = {"centers": [[8, 0]]} if name == "region" else {}
        mask, other = (Pattern(name, **p)(TILED) for p in (EXAMPLES[name], params))
        assert not torch.equal(mask, other)

    def test_streams(self):
        pattern = Pattern("random_blocks", seed=3)
        assert torch.equal(pattern(PLAIN), random_blocks(PLAIN, seed=3, stream=0))
        assert torch.equal(pattern(PLAIN, stream=5), random_blocks(PLAIN, seed=3, stream=5))
        assert not torch.equal(pattern(PLAIN, stream=5), pattern(PLAIN))
        joined = pattern | Pattern("strided", stride=6)
        assert torch.equal(joined(PLAIN, stream=5), pattern(PLAIN, stream=5) | strided(PLAIN, 6))
        assert torch.equal(Pattern("strided")(PLAIN, stream=5), strided(PLAIN))

    @pytest.mark.parametrize("layout", [LAYOUT, PLAIN])
    def test_or_and_and(self, layout):
        near, grid = Pattern("local_window", radius=2, metric="l1"), Pattern("strided", stride=3)
        boxes = Pattern("window", size=4)
        a, b, c = near(layout), grid(layout), boxes(layout)
        assert torch.equal((near | grid)(layout), a | b)
        assert torch.equal((near & grid)(layout), a & b)
        assert torch.equal((near | grid | boxes)(layout), a | b | c)
        assert torch.equal((near & (grid | boxes))(layout), a & (b | c))
        assert torch.equal((near & grid | boxes)(layout), a & b | c)
        assert torch.equal(((near | grid) & (grid | boxes) & near)(layout), (a | b) & (b | c) & a)

    def test_or_and_and_differ(self):
        """Twin: the masks above all differ."""
        a, b, c = (
            Pattern(name, **EXAMPLES[name])(PLAIN) for name in ("local_window", "strided", "window")
        )
        masks = (a, b, c, a | b, a & b, a & (b | c), a & b | c)
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)

    @pytest.mark.parametrize(
        "pattern",
        [
            *(Pattern(name, **params) for name, params in EXAMPLES.items()),
            Pattern("region", centers=((1, 2), (3, 4))),
            Pattern("local_window") | Pattern("strided", stride=3),
            Pattern("local_window")
            & (Pattern("strided", stride=3) | Pattern("region", centers=[(1, 2)])),
        ],
        ids=repr,
    )
    def test_spec_survives_json(self, pattern):
        again = Pattern.from_spec(json.loads(json.dumps(pattern.spec)))
        assert again == pattern
        assert hash(again) == hash(pattern)
        assert again.spec == pattern.spec
        assert repr(again) == repr(pattern)
        assert torch.equal(again(LAYOUT), pattern(LAYOUT))

    def test_spec_is_plain_data(self):
        near, grid = Pattern("local_window", radius=4), Pattern("strided", stride=8)
        assert near.spec == {"pattern": "local_window", "radius": 4}
        assert (near | grid).spec == {"any": [near.spec, grid.spec]}
        assert (near & grid).spec == {"all": [near.spec, grid.spec]}

    def test_equality_and_hash(self):
        pattern = Pattern("local_window", radius=4, metric="l1")
        assert pattern == Pattern("local_window", radius=4, metric="l1")
        assert hash(pattern) == hash(Pattern("local_window", radius=4, metric="l1"))
        for other in (
            Pattern("local_window", radius=5, metric="l1"),
            Pattern("local_window", radius=4),
            pattern | pattern,
            pattern & pattern,
            "local_window",
            None,
        ):
            assert pattern != other
        assert pattern | Pattern("dense") != pattern & Pattern("dense")
        assert len({pattern, Pattern("local_window", radius=4, metric="l1"), Pattern("dense")}) == 2

    def test_the_order_of_parameters_does_not_matter(self):
        first = Pattern("local_window", radius=4, metric="l1")
        second = Pattern("local_window", metric="l1", radius=4)
        assert first == second
        assert hash(first) == hash(second)
        assert hash(first | Pattern("dense")) == hash(second | Pattern("dense"))
        assert {first: "found"}.get(second) == "found"

    def test_tuples_are_lists(self):
        centers = (((1, 2), (3, 4)), [[1, 2], [3, 4]])
        first, second = (Pattern("region", centers=value) for value in centers)
        assert first == second
        assert hash(first) == hash(second)

    def test_equal_numbers_hash_equally(self):
        whole, decimal = Pattern("nearest", sparsity=1), Pattern("nearest", sparsity=1.0)
        assert whole != decimal or hash(whole) == hash(decimal)

    def test_repr_names_everything(self):
        near, grid = Pattern("local_window", radius=4), Pattern("strided", stride=8)
        pattern = near | grid & Pattern("dense")
        assert repr(pattern) == "(local_window(radius=4) | (strided(stride=8) & dense()))"

    def test_spec_is_a_copy(self):
        centers = [[1, 2], [3, 4]]
        pattern = Pattern("region", centers=centers)
        joined = pattern | Pattern("dense")
        known, joined_known = json.dumps(pattern.spec), json.dumps(joined.spec)
        mask, hashes = pattern(LAYOUT), (hash(pattern), hash(joined))
        centers[0][0] = 7
        pattern.spec["centers"][0][0] = 7
        pattern.spec["pattern"] = "dense"
        joined.spec["any"][0]["radius"] = 3
        joined.spec["any"].append({"pattern": "nonsense"})
        assert (json.dumps(pattern.spec), json.dumps(joined.spec)) == (known, joined_known)
        assert (hash(pattern), hash(joined)) == hashes
        assert torch.equal(pattern(LAYOUT), mask)

    def test_from_spec_copies(self):
        spec = {"any": [{"pattern": "region", "centers": [[1, 2]]}, {"pattern": "dense"}]}
        pattern = Pattern.from_spec(spec)
        spec["any"][0]["centers"][0][0] = 9
        assert pattern == Pattern("region", centers=[(1, 2)]) | Pattern("dense")

    def test_unknown_name(self):
        for make in (
            lambda: Pattern("gaussian"),
            lambda: Pattern.from_spec({"pattern": "gaussian"}),
        ):
            with pytest.raises(
                ValueError, match=r"'gaussian' is unknown: allowed are dense, .*window"
            ):
                make()

    @pytest.mark.parametrize(
        ("name", "param", "allowed"),
        [
            ("local_window", "width", "radius, metric"),
            ("dense", "radius", "none"),
            ("random_blocks", "stream", "sparsity, seed"),
            ("strided", "layout", "stride"),
        ],
    )
    def test_unknown_parameter(self, name, param, allowed):
        for make in (
            lambda: Pattern(name, **{param: 1}),
            lambda: Pattern.from_spec({"pattern": name, param: 1}),
        ):
            with pytest.raises(
                ValueError,
                match=f"'{name}' has no parameter '{param}': allowed are {allowed}\\.",
            ):
                make()

    @pytest.mark.parametrize(
        "spec",
        [
            {},
            {"radius": 3},
            {"any": [{"pattern": "dense"}], "all": [{"pattern": "dense"}]},
            {"any": []},
            {"any": 3},
            {"all": {"pattern": "dense"}},
            {"any": ["dense"]},
            {"any": [{"pattern": "dense"}, {"pattern": "gaussian"}]},
            {"pattern": ["dense"]},
            {"pattern": None},
            {"pattern": "local_window", "name": 3},
            {"pattern": "local_window", "any": []},
            "dense",
            None,
        ],
        ids=repr,
    )
    def test_damaged_spec(self, spec):
        """`from_spec` refuses every damaged spec with its own message."""
        with pytest.raises(ValueError, match=r"pattern.*: allowed are"):
            Pattern.from_spec(spec)

    @pytest.mark.parametrize(
        "other", [torch.ones(2, 2, dtype=torch.bool), {"pattern": "dense"}, None]
    )
    def test_joins_only_patterns(self, other):
        with pytest.raises(TypeError):
            Pattern("local_window") | other
        with pytest.raises(TypeError):
            Pattern("local_window") & other

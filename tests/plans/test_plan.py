from __future__ import annotations

import copy
import json
import os
import pickle
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_vision import HeadMasks, LayerSpec, ModelSpec, PlanError, SparsityPlan
from bsa_vision.masks import (
    PATTERNS,
    Pattern,
    TokenLayout,
    local_window,
    random_blocks,
    stack_heads,
)
from bsa_vision.plans import plan_file
from bsa_vision.plans.static_mask import Static

SPEC = ModelSpec(
    "dinov3",
    tuple(LayerSpec(f"model.layer.{i}.attention", i, 3, 64) for i in range(4)),
    grid=(9, 14),
    patch_size=(16, 16),
    num_prefix_tokens=5,
)
SMALL = dict(block_size=8, tile=(2, 4))


def dumps(plan):
    return plan_file.dumps(plan.to_dict())


def loads(text):
    return SparsityPlan.from_dict(plan_file.loads(text))


def uniform(pattern="local_window", **options) -> SparsityPlan:
    return SparsityPlan.uniform(SPEC, pattern, **{**SMALL, **options})


def own(layout):
    return local_window(layout, 1)


class TestBuilding:
    def test_uniform(self):
        plan = uniform(radius=2, dense_heads=1, layers=[1, 3])
        near = "local_window(radius=2)"
        assert plan.layers["self.0"] == ("dense",) * 3
        assert plan.layers["self.1"] == plan.layers["self.3"] == ("dense", near, near)
        assert plan.patterns == {near: Pattern("local_window", radius=2)}

    def test_replace_is_one_head_at_a_time_and_returns_a_new_plan(self):
        plan = uniform(radius=2)
        changed = plan.replace(layers=["self.2"], heads=[1], pattern="strided", stride=3)
        assert changed.layers["self.2"] == (
            "local_window(radius=2)",
            "strided(stride=3)",
            "local_window(radius=2)",
        )
        assert changed.layers["self.1"] == plan.layers["self.1"]
        assert plan == uniform(radius=2)

    def test_replace_forgets_what_nothing_uses(self):
        assert uniform(radius=2).replace(pattern="dense").patterns == {}

    def test_every_pattern_of_the_table_can_be_used(self):
        needed = {"region": dict(centers=[(3, 3)])}
        for name in PATTERNS:
            plan = uniform(name, **needed.get(name, {}))
            assert 0 <= plan.sparsity(plan.layout(SPEC)) < 1

    def test_patterns_join(self):
        joined = Pattern("window", size=4) | Pattern("strided", stride=5)
        plan = uniform(joined)
        layout = plan.layout(SPEC)
        expected = Pattern("window", size=4)(layout) | Pattern("strided", stride=5)(layout)
        assert torch.equal(plan.compile("self.0", layout).base_blockmask[0, 2], expected)

    def test_functions_with_one_name_stay_apart(self):
        def make(radius):
            def near(layout):
                return local_window(layout, radius)

            return near

        plan = (
            uniform(make(0)).replace(heads=[1], pattern=make(5)).replace(heads=[2], pattern=make(1))
        )
        assert len(plan.patterns) == 3
        densities = [1 - s for s in plan.compile("self.0", plan.layout(SPEC)).head_sparsity]
        assert densities[0] < densities[2] < densities[1]

    def test_random_heads_and_layers_draw_anew(self):
        plan = uniform("random_blocks", sparsity=0.5, seed=3)
        layout = plan.layout(SPEC)
        slices = [
            mask for key in plan.layers for mask in plan.compile(key, layout).base_blockmask[0]
        ]
        assert len({mask.numpy().tobytes() for mask in slices}) == len(slices)
        again = uniform("random_blocks", sparsity=0.5, seed=3).compile("self.2", layout)
        assert torch.equal(again.base_blockmask, plan.compile("self.2", layout).base_blockmask)

    def test_from_head_masks(self):
        layout = TokenLayout((9, 14), num_prefix_tokens=5, block_size=8)
        hm = HeadMasks(
            stack_heads([local_window(layout, 1), random_blocks(layout)], 2),
            [0, 2, 1],
            block_size=8,
        )
        plan = SparsityPlan.from_head_masks(SPEC, {"model.layer.2.attention": hm})
        assert plan.order == "raster"
        assert plan.layers["self.0"] == ("dense",) * 3
        compiled = plan.compile("self.2", plan.layout(SPEC))
        assert compiled.slices == (0, 1, 2)
        assert torch.equal(compiled.base_blockmask[0], hm.base_blockmask[0, [1, 0]])


class TestNames:
    def test_a_function_called_dense_is_not_dense(self):
        def dense(layout):
            return torch.eye(layout.num_blocks, dtype=torch.bool)

        plan = uniform(dense)
        assert set(plan.patterns) == {"dense (function)"}
        assert plan.sparsity(plan.layout(SPEC)) > 0.5

    def test_a_function_called_like_a_pattern_does_not_take_its_place(self):
        def axial(layout):
            return own(layout)

        plan = uniform(axial).replace(heads=0, pattern="axial")
        masks = plan.compile("self.0", plan.layout(SPEC)).base_blockmask[0]
        assert torch.equal(masks[0], Pattern("axial")(plan.layout(SPEC)))
        assert torch.equal(masks[1], own(plan.layout(SPEC)))

    def test_equal_plans_hash_equally(self):
        plan = uniform(radius=1)
        other = SparsityPlan(
            plan.model,
            plan.patterns,
            {key: list(plan.layers[key]) for key in reversed(plan.layers)},
            tile=[2, 4],
            block_size=8,
        )
        assert plan == other
        assert hash(plan) == hash(other)

    def test_one_layer_or_head_needs_no_list(self):
        plan = uniform(radius=1, layers=2).replace(layers="self.1", heads=0, pattern="axial")
        assert plan.layers["self.1"] == ("axial()", "dense", "dense")
        assert plan.layers["self.2"] == ("local_window(radius=1)",) * 3

    def test_completing_names_every_layer(self):
        plan = SparsityPlan(SPEC.fingerprint, {}, {"self.1": ("dense",) * 3})
        assert plan.complete(SPEC).layers == {f"self.{i}": ("dense",) * 3 for i in range(4)}


class TestCompiling:
    def test_special_tokens_are_always_kept(self):
        plan = uniform(lambda layout: torch.eye(layout.num_blocks, dtype=torch.bool))
        layout = plan.layout(SPEC)
        mask = plan.compile("self.0", layout).base_blockmask[0, 0]
        assert mask[layout.special_blocks].all()
        assert mask[:, layout.special_blocks].all()
        assert not mask.all()

    def test_a_pattern_that_keeps_everything_is_dense(self):
        plan = uniform(radius=99)
        assert plan.compile("self.0", plan.layout(SPEC)).all_dense

    def test_geometric_patterns_carry_over_to_other_grids(self):
        plan = uniform(radius=1)
        for grid in ((9, 14), (20, 7), (3, 3)):
            layout = plan.layout(SPEC, grid)
            assert torch.equal(
                plan.compile("self.0", layout).block_mask(*[layout.num_tokens] * 2)[0, 0],
                own(layout),
            )

    def test_made_once_from_any_thread(self):
        calls = []

        def slow(layout):
            calls.append(layout)
            return own(layout)

        plan = uniform(slow)
        layout = plan.layout(SPEC)
        first = plan.compile("self.0", layout)
        seen = []
        threads = [
            threading.Thread(target=lambda: seen.append(plan.compile("self.0", layout)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(masks is first for masks in seen)
        assert len(calls) == 3

    def test_sparsity_counts_dense_layers(self):
        plan = uniform(radius=0, layers=[0])
        layout = plan.layout(SPEC)
        assert plan.sparsity(layout) == pytest.approx(plan.compile("self.0", layout).sparsity / 4)

    def test_an_empty_row_is_refused(self):
        bare = ModelSpec("vit", (LayerSpec("attn", 0, 1, 8),), (4, 4), (8, 8))
        plan = SparsityPlan.uniform(
            bare, lambda layout: torch.zeros(2, 2, dtype=torch.bool), **SMALL
        )
        with pytest.raises(
            PlanError, match=r"layer 'self.0' of the plan: query block 0.*keeps no key block"
        ):
            plan.compile("self.0", plan.layout(bare))


class TestFiles:
    def test_round_trip(self, tmp_path):
        plan = uniform(radius=2, dense_heads=1).replace(
            layers=[1],
            heads=[2],
            pattern=Pattern("axial") | Pattern("region", centers=[(1, 2)]) & Pattern("strided"),
        )
        plan.save(tmp_path / "plan.json")
        loaded = SparsityPlan.load(tmp_path / "plan.json")
        assert loaded == plan
        assert hash(loaded) == hash(plan)
        assert os.listdir(tmp_path) == ["plan.json"]

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**30), st.floats(0, 1), st.sampled_from(["raster", "tile"]))
    def test_static_masks_round_trip(self, seed, density, order):
        layout = TokenLayout((9, 14), num_prefix_tokens=5, order=order, **SMALL)
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(layout.num_blocks, layout.num_blocks, generator=generator) < density
        mask.fill_diagonal_(True)
        plan = uniform(Static(mask, layout), order=order)
        loaded = loads(dumps(plan))
        assert loaded == plan
        assert torch.equal(loaded.compile("self.3", layout).block_mask(131, 131)[0, 1], mask)

    def test_one_line_per_layer(self):
        lines = dumps(uniform(radius=2, dense_heads=2)).splitlines()
        near = "local_window(radius=2)"
        assert f'    "self.0": ["dense", "dense", "{near}"],' in lines
        assert f'    "{near}": {{"pattern": "local_window", "radius": 2}}' in lines

    def test_functions_must_be_frozen(self, tmp_path):
        plan = uniform(own)
        with pytest.raises(PlanError, match=r"pattern 'own' is a Python function.*plan\.freeze"):
            plan.save(tmp_path / "plan.json")
        assert not list(tmp_path.iterdir())
        layout = plan.layout(SPEC)
        frozen = loads(dumps(plan.freeze(layout)))
        assert torch.equal(
            frozen.compile("self.1", layout).base_blockmask,
            plan.compile("self.1", layout).base_blockmask,
        )

    def test_what_cannot_be_read_back_is_not_written(self, tmp_path):
        path = tmp_path / "plan.json"
        uniform(radius=2).save(path)
        before = path.read_text()
        for notes in ({"x": torch.ones(1)}, {"x": float("nan")}):
            with pytest.raises(PlanError, match="JSON cannot"):
                SparsityPlan(SPEC.fingerprint, {}, {"self.0": ("dense",) * 3}, notes=notes).save(
                    path
                )
        assert path.read_text() == before
        with pytest.raises(PlanError, match="names must be strings"):
            SparsityPlan(SPEC.fingerprint, {}, {"self.0": ("dense",) * 3}, notes={1: "x"})

    def test_links_stay_links(self, tmp_path):
        (tmp_path / "link.json").symlink_to(tmp_path / "plan.json")
        uniform(radius=2).save(tmp_path / "link.json")
        assert (tmp_path / "link.json").is_symlink()
        assert SparsityPlan.load(tmp_path / "plan.json") == uniform(radius=2)

    def test_freeze_takes_what_the_plan_computes(self):
        """A function that answers otherwise every time is frozen as it was laid out, head by head."""
        calls = iter(range(99))
        plan = uniform(lambda layout: local_window(layout, 3 * (next(calls) % 2)))
        layout = plan.layout(SPEC)
        compiled = {key: plan.compile(key, layout).base_blockmask for key in plan.layers}
        frozen = plan.freeze(layout)
        for key, masks in compiled.items():
            assert torch.equal(frozen.compile(key, layout).base_blockmask, masks)
        assert len(frozen.patterns) == 2

    def test_freeze_keeps_random_draws(self):
        plan = uniform("random_blocks", sparsity=0.6).replace(heads=[0], pattern="dense")
        layout = plan.layout(SPEC)
        frozen = plan.freeze(layout)
        for key in plan.layers:
            assert torch.equal(
                frozen.compile(key, layout).base_blockmask, plan.compile(key, layout).base_blockmask
            )

    def test_a_failed_write_loses_nothing(self, tmp_path, monkeypatch):
        path = tmp_path / "plan.json"
        uniform(radius=2).save(path)
        before = path.read_text()

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            uniform(radius=3).save(path)
        assert path.read_text() == before
        assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]

    def test_pickle_and_deepcopy(self):
        plan = uniform(radius=2)
        plan.compile("self.0", plan.layout(SPEC))
        assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan


GOOD = json.loads(dumps(uniform(radius=2)))
STATIC = json.loads(
    dumps(
        uniform(
            Static(
                torch.eye(17, dtype=torch.bool),
                TokenLayout((9, 14), num_prefix_tokens=5, order="tile", **SMALL),
            )
        )
    )
)


def damaged(change, start=GOOD) -> str:
    data = copy.deepcopy(start)
    change(data)
    return json.dumps(data)


def cut_static(data):
    pattern = next(iter(data["patterns"].values()))
    pattern["static"] = pattern["static"][:8]


BAD_FILES = {
    "not json": ('{"format": "bsa-vis', "not JSON .*restore it or save the plan again"),
    "another format": (
        damaged(lambda d: d.update(format="lora")),
        "no 'format': 'bsa-vision/plan'.*written by plan.save",
    ),
    "a list": ("[]", "this is not a plan of bsa-vision"),
    "a newer version": (
        damaged(lambda d: d.update(version=3)),
        "version 3: this bsa-vision reads versions 1 and 2",
    ),
    "unknown key": (
        damaged(lambda d: d.update(seed=1)),
        r"unknown keys \['seed'\].*allowed are format",
    ),
    "missing key": (damaged(lambda d: d.pop("layers")), r"lacks \['layers'\]"),
    "model key": (
        damaged(lambda d: d["model"].update(width=3)),
        r"'model' has unknown keys \['width'\]",
    ),
    "model type": (
        damaged(lambda d: d["model"].update(heads="3")),
        "model.heads is '3': expected int",
    ),
    "layout": (
        damaged(lambda d: d["layout"].update(order="spiral")),
        "order='spiral': allowed are 'raster', 'tile'",
    ),
    "unknown pattern": (
        damaged(
            lambda d: d["patterns"].update({"local_window(radius=2)": {"pattern": "localish"}})
        ),
        "pattern 'localish' is unknown: allowed are dense",
    ),
    "unknown parameter": (
        damaged(lambda d: d["patterns"]["local_window(radius=2)"].update(raduis=3)),
        "no parameter 'raduis': allowed are radius, metric",
    ),
    "pattern type": (
        damaged(lambda d: d["patterns"].update({"local_window(radius=2)": 3})),
        "is 3: expected an object",
    ),
    "undeclared": (
        damaged(lambda d: d["layers"].update({"self.0": ["near"] * 3})),
        "uses pattern 'near', which is not declared",
    ),
    "heads": (
        damaged(lambda d: d["layers"].update({"self.0": ["dense"]})),
        "names 1 heads, the model has 3",
    ),
    "layer type": (
        damaged(lambda d: d["layers"].update({"self.0": "dense"})),
        "layer 'self.0' is 'dense': expected a list",
    ),
    "layer key": (
        damaged(lambda d: d["layers"].update({"self.9": ["dense"] * 3})),
        "'self.9' is not one of 4 layers.*'self.3'",
    ),
    "version is true": (damaged(lambda d: d.update(version=True)), "version True"),
    "scores": (damaged(lambda d: d.update(scores=[1])), r"'scores' is \[1\]: expected an object"),
    "scores of a layer": (
        damaged(lambda d: d.update(scores={"self.0": "abc"})),
        "scores of layer 'self.0' are 'abc'",
    ),
    "notes": (damaged(lambda d: d.update(notes="x")), "'notes' is 'x': expected an object"),
    "nested too deep": ("[" * 100000, "not JSON"),
    "no layers": (damaged(lambda d: d.update(layers={})), "with 0 layers.*at least one layer"),
    "leading zero": (
        damaged(lambda d: d["layers"].update({"self.00": ["dense"] * 3})),
        "'self.00' is not one of 4 layers",
    ),
    "other digits": (
        damaged(lambda d: d["layers"].update({"self.\u0661": ["dense"] * 3})),
        "is not one of 4 layers",
    ),
    "dense declared": (
        damaged(lambda d: d["patterns"].update(dense={"pattern": "special"})),
        "'dense' always means every",
    ),
    "empty join": (
        damaged(lambda d: d["patterns"].update({"local_window(radius=2)": {"any": []}})),
        "pattern spec .*allowed are",
    ),
    "static cut": (damaged(cut_static, STATIC), "is damaged .*save it again"),
    "static base64": (
        damaged(lambda d: next(iter(d["patterns"].values())).update(static="***"), STATIC),
        "is damaged .*bit-packed base64",
    ),
    "static layout": (
        damaged(lambda d: next(iter(d["patterns"].values())).pop("layout"), STATIC),
        r"lacks \['layout'\]",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_damaged_files(name, tmp_path):
    text, message = BAD_FILES[name]
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        SparsityPlan.load(path)
    assert str(path) in str(caught.value)


TEXT = json.dumps(GOOD)


def test_plans_of_version_1():
    """It named special tokens, and some of what tuning notes, otherwise."""
    data = copy.deepcopy(STATIC) | {"version": 1}
    (name,) = data["patterns"]
    layout = data["patterns"][name]["layout"]
    layout["start"], layout["end"] = (
        layout.pop("num_prefix_tokens"),
        layout.pop("num_suffix_tokens"),
    )
    images = {"chosen on": 2, "kept back": 1, "seed": 0}
    data["notes"] = {"tuned": {"special tokens": 5, "images": images, "images above": None}}
    plan = loads(json.dumps(data))
    assert plan.patterns == loads(json.dumps(STATIC)).patterns
    assert plan.report == {
        "special_tokens": 5,
        "images": {"calibration": 2, "held_out": 1, "seed": 0},
        "images_above": None,
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.replace('"layers"', '"layers": {}, "layers"').encode(), "'layers' is written twice"),
        (TEXT.replace('"radius"', '"radius": 1, "radius"').encode(), "'radius' is written twice"),
        (TEXT.replace('"version": 2', '"version": ' + "1" * 5000).encode(), "not JSON"),
        (
            TEXT.replace('"notes": {}', '"notes": {"x": ' + "[" * 60 + "]" * 60 + "}").encode(),
            "more than 50 deep",
        ),
        (TEXT.replace('"notes": {}', '"notes": {"x": NaN}').encode(), "NaN is no number of JSON"),
        (
            TEXT.replace('"notes": {}', '"notes": {"x": -Infinity}').encode(),
            "-Infinity is no number of JSON",
        ),
        (TEXT.replace('"notes": {}', '"notes": {"x": [1e999]}').encode(), "too large for a float"),
        (b"\xff\xfe" + TEXT.encode(), "not JSON"),
        (b"\xef\xbb\xbf" + TEXT.encode(), "not JSON"),
        (TEXT.replace("dinov3", "\xe9").encode("latin-1"), "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_bytes_that_are_no_plan(data, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    with pytest.raises(PlanError, match=message):
        SparsityPlan.load(path)


def test_nothing_but_plan_errors_comes_of_changed_bytes():
    """Values replaced, bytes changed, lost, and doubled; every other change of one character at least is refused or loads."""
    draw = random.Random(0)
    others = [
        b"null",
        b"true",
        b"-1",
        b"1e999",
        b"NaN",
        b"9" * 30,
        b"[]",
        b"{}",
        b'"x"',
        b"\xff",
        b"1.5",
        b"}",
        b'"',
    ]
    loaded = 0
    for text in (TEXT.encode(), json.dumps(STATIC).encode()) * 400:
        data = bytearray(text)
        values = [
            m.span()
            for m in re.finditer(rb'(?<=[:\[,]) ?("[^"]*"|[\d.]+|\[[^\[\]]*\]|\{[^{}]*\})', text)
        ]
        place = draw.randrange(len(data))
        first, last = draw.choice(
            [draw.choice(values), (place, place + draw.randrange(9)), (place, place)]
        )
        data[first:last] = draw.choice([*others, data[place : place + 9], b""])
        try:
            loads(bytes(data))
            loaded += 1
        except PlanError:
            pass
    assert 0 < loaded < 400


def test_undamaged_files_load():
    """The twin of the above: what the damage was done to is good."""
    assert loads(json.dumps(GOOD)) == uniform(radius=2)
    assert isinstance(next(iter(loads(json.dumps(STATIC)).patterns.values())), Static)


def test_no_file():
    with pytest.raises(FileNotFoundError):
        SparsityPlan.load(Path("no-such-plan.json"))


LAYOUT = TokenLayout((9, 14), num_prefix_tokens=5, block_size=8)
THREE = stack_heads([local_window(LAYOUT, 1)] * 3, 1)
BAD_PLANS = {
    "unknown pattern": (
        lambda: uniform("near"),
        "pattern 'near' is unknown: allowed are dense.*choose one",
    ),
    "unknown parameter": (
        lambda: uniform("local_window", raduis=2),
        "no parameter 'raduis'.*correct its name",
    ),
    "dense parameters": (
        lambda: uniform("dense", radius=2),
        "'dense' has no parameters, got radius",
    ),
    "not a pattern": (lambda: uniform(3), "pattern=3: expected a name, a Pattern, or a function"),
    "parameters of a function": (
        lambda: uniform(own, radius=2),
        "takes no further parameters, got radius",
    ),
    "dense_heads": (
        lambda: uniform(radius=1, dense_heads=4),
        "dense_heads=4: the model has 3 heads",
    ),
    "no such layer to compile": (
        lambda: uniform(radius=1).compile("self.99", TokenLayout((4, 4))),
        "no layer 'self.99' in this plan: it has self.0",
    ),
    "no such layer": (
        lambda: uniform(radius=1, layers=[7]),
        r"layers \[7\] match nothing: the plan has self.0, self.1",
    ),
    "no layers": (lambda: uniform(radius=1, layers=[]), r"layers \[\] match nothing"),
    "no such head": (
        lambda: uniform(radius=1).replace(heads=[3], pattern="dense"),
        r"heads=\[3\] match no head.*0 to 2",
    ),
    "no heads": (
        lambda: uniform(radius=1).replace(heads=[], pattern="dense"),
        r"heads=\[\] match no head",
    ),
    "no masks": (lambda: SparsityPlan.from_head_masks(SPEC, {}), "got no masks"),
    "layer name": (
        lambda: SparsityPlan.from_head_masks(
            SPEC, {"blocks.1.attn": HeadMasks(THREE, layout=LAYOUT)}
        ),
        "no attention layer 'blocks.1.attn'.*it has model.layer.0.attention",
    ),
    "heads of masks": (
        lambda: SparsityPlan.from_head_masks(
            SPEC, {"self.1": HeadMasks(THREE[:, :2], layout=LAYOUT)}
        ),
        "has 3 heads, its HeadMasks 2",
    ),
    "size of masks": (
        lambda: SparsityPlan.from_head_masks(
            SPEC, {"self.1": HeadMasks(THREE[..., :9, :9], block_size=8)}
        ),
        r"\(9, 9\) blocks, TokenLayout\(grid=\(9, 14\), num_prefix_tokens=5.* has 17.*image_size",
    ),
    "masks differ in the batch": (
        lambda: SparsityPlan.from_head_masks(
            SPEC, {"self.1": HeadMasks(torch.cat([THREE, torch.ones_like(THREE)]), layout=LAYOUT)}
        ),
        "differ across the batch",
    ),
    "cross attention": (
        lambda: SparsityPlan.from_head_masks(
            SPEC,
            {
                "self.1": HeadMasks(
                    THREE, layout=LAYOUT, kv_layout=TokenLayout((131, 1), block_size=8)
                )
            },
        ),
        "other keys than queries",
    ),
    "orders": (
        lambda: SparsityPlan.from_head_masks(
            SPEC,
            {
                "self.0": HeadMasks(THREE, layout=LAYOUT),
                "self.1": HeadMasks(
                    THREE,
                    layout=TokenLayout((9, 14), num_prefix_tokens=5, order="tile", block_size=8),
                ),
            },
        ),
        "one plan has one order",
    ),
    "static shape": (
        lambda: Static(torch.ones(3, 3, dtype=torch.bool), LAYOUT),
        r"shape \(3, 3\): expected .*\(17, 17\)",
    ),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plans(name):
    make, message = BAD_PLANS[name]
    with pytest.raises(PlanError, match=message):
        make()


class TestLayerNames:
    def test_layers_by_index_key_or_path(self):
        by = [uniform("axial", layers=[layer]) for layer in (1, "1", "self.1", SPEC.layers[1].name)]
        assert all(plan == by[0] for plan in by)

    @pytest.mark.parametrize(
        ("layers", "said"),
        [
            (
                ["model.layer.1.atention"],
                r"no attention layer 'model.layer.1.atention'.*nearest are .*model.layer.1.attention",
            ),
            ("selv.1", "no attention layer 'selv.1'"),
        ],
    )
    def test_unknown_names_and_what_is_near(self, layers, said):
        with pytest.raises(PlanError, match=said):
            uniform("axial", layers=layers)
        with pytest.raises(PlanError, match=r"nearest are self.0"):
            uniform("axial").replace(layers="self.00", pattern="dense")

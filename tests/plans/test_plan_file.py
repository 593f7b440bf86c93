"""Plan files: round trips, files of version 1, damaged files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_vision import PlanError, SparsityPlan
from bsa_vision.masks import (
    Pattern,
    TokenLayout,
    local_window,
)
from bsa_vision.plans import plan_file
from bsa_vision.plans.static_mask import Static
from tests.plans.test_plan import SMALL, SPEC, own, uniform


def dumps(plan):
    return plan_file.dumps(plan.to_dict())


def loads(text):
    return SparsityPlan.from_dict(plan_file.loads(text))


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
            with pytest.raises(PlanError, match="cannot be written as JSON"):
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
        """A function that returns a new mask at every call is frozen as it was compiled."""
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
        "'dense' is reserved",
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
    """Version 1 had other names for special tokens and for some notes of the tuner."""
    data = copy.deepcopy(STATIC) | {"version": 1}
    (name,) = data["patterns"]
    layout = data["patterns"][name]["layout"]
    layout["start"] = layout.pop("num_prefix_tokens")
    layout["end"] = layout.pop("num_suffix_tokens")
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
            "more than 50 levels deep",
        ),
        (TEXT.replace('"notes": {}', '"notes": {"x": NaN}').encode(), "NaN is not a JSON number"),
        (
            TEXT.replace('"notes": {}', '"notes": {"x": -Infinity}').encode(),
            "-Infinity is not a JSON number",
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
    """Files with replaced values or changed, lost or doubled bytes raise PlanError or load."""
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
    """The files that the tests above damage are valid."""
    assert loads(json.dumps(GOOD)) == uniform(radius=2)
    assert isinstance(next(iter(loads(json.dumps(STATIC)).patterns.values())), Static)


def test_no_file():
    with pytest.raises(FileNotFoundError):
        SparsityPlan.load(Path("no-such-plan.json"))

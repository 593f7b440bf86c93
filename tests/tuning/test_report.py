"""The HTML report: well-formed, self-contained, and consistent with results and attention."""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bsa_vision as bsa
from bsa_vision.adapters import Observation
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.plans.model_spec import LayerSpec
from bsa_vision.storage import atomic_write
from bsa_vision.tuning import attention_views, html_report, plots
from bsa_vision.tuning.bounds import mean_at_most
from tests.helpers import models, sam_models
from tests.helpers.tuning import SMALL, images

NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
VOID = {"meta", "img"}


class Parsed(HTMLParser):
    """Tags with their attributes, and the text; unbalanced tags raise an error."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def values(self, attribute):
        return [attrs[attribute] for _, attrs in self.tags if attribute in attrs]

    @property
    def views(self):
        return self.values("class").count("view")


@pytest.fixture(scope="module")
def model():
    return models.make("dinov3")


@pytest.fixture(scope="module")
def plan(model):
    return bsa.tune(model, images(4), sparsity=0.4, order="tile", **SMALL)


@pytest.fixture(scope="module")
def sam():
    return sam_models.make("segment_anything")


@pytest.fixture(scope="module")
def sam_plan(sam):
    return bsa.tune(sam, images(8), max_error=0.5, verify=0.5, **SMALL)


def drawn(plan, tmp_path, *args, **options):
    html_report.report(plan, tmp_path / "page.html", *args, **options)
    return Parsed((tmp_path / "page.html").read_text(encoding="utf-8"))


def changed(plan, **values):
    """Return the plan with other values in its results."""
    return replace(plan, notes={"tuned": {**copy.deepcopy(plan.notes["tuned"]), **values}})


class TestPage:
    @pytest.mark.parametrize("name", ["plan", "sam_plan"])
    def test_is_complete_in_itself(self, name, request, tmp_path):
        chosen, its_model = (
            request.getfixturevalue(x) for x in (name, {"plan": "model", "sam_plan": "sam"}[name])
        )
        found = drawn(chosen, tmp_path, its_model, images(1)[0])
        html = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\"' <)]+", html)) <= NAMESPACES
        assert all(source.startswith("data:") for source in found.values("src"))
        assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object"}
        ids = found.values("id")
        assert len(ids) > 100
        assert len(set(ids)) == len(ids)
        refers = [
            *found.values("xlink:href"),
            *(f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", html)),
        ]
        internal = {name for name in refers if not name.startswith("data:")}
        assert internal <= {f"#{name}" for name in ids}
        assert "@import" not in html
        assert re.findall(r"url\((?!#)", html) == []

    def test_ids_would_clash(self, plan, monkeypatch, tmp_path):
        """Without different prefixes, several figures share ids."""
        monkeypatch.setattr(
            plots, "re", SimpleNamespace(findall=re.findall, sub=lambda pattern, to, text: text)
        )
        ids = drawn(plan, tmp_path).values("id")
        assert len(set(ids)) < len(ids)

    def test_an_unbalanced_page_is_noticed(self):
        for html in ("<p><b>x</p>", "<p>x", "x</p>"):
            with pytest.raises((AssertionError, IndexError)):
                Parsed(html)

    @pytest.mark.parametrize("name", ["plan", "sam_plan"])
    def test_says_what_the_notes_say(self, name, request, tmp_path):
        chosen = request.getfixturevalue(name)
        tuned, text = chosen.notes["tuned"], drawn(chosen, tmp_path).text
        for layer in tuned["layers"]:
            assert text.count(layer["layer"]) >= 3  # in two figures, and the table
            for head in layer["heads"]:
                assert head["pattern"] in text
                assert f"{head['error']:.4g}" in text
        blocks = f"{tuned['sparsity']:.1%} of the blocks of {len(tuned['layers'])} layers"
        assert f"The plan skips {blocks}." in text
        held_out = tuned["images"]["held_out"]
        mean = "mean " * (held_out > 1)
        measured, predicted = f"{tuned['measured']:.3g}", f"{tuned['predicted']:.3g}"
        assert f"the {mean}relative L2 error of the target is {measured} " in text
        assert f"{measured} (predicted: {predicted})" in text
        if held_out > 1:
            assert f"at most {tuned['bound']:.3g}, with 99% confidence" in text
        limit = f"{tuned['certificate']['limit']:.3g}"
        share = math.ceil(1000 * tuned["certificate"]["share"]) / 10
        assert f"at most {share:.1f}% of images like these have an error above {limit}" in text
        assert f"had an error above {limit}. With 95% confidence, at most" in text
        assert f"correlation {tuned['correlation']:.2f}" in text
        assert ("largest error measured" in text) == (name == "plan")
        assert ("adjusted on these images" in text) == tuned["certificate"]["adjusted"]
        assert ("Token orders compared" in text) == bool(tuned["orders"]) == (name == "sam_plan")
        calibration = tuned["images"]["calibration"]
        assert f"{calibration} calibration, {held_out} held out, seed 0" in text
        assert "Attention of single heads" not in text

    def test_shares_are_rounded_up(self, plan):
        certificate = dict(
            images=59, limit=0.05, above=1, share=0.07801, confidence=0.95, adjusted=True
        )
        tuned = {**plan.notes["tuned"], "asked": {"max_error": 0.05}, "certificate": certificate}
        assert html_report._certificate(tuned) == (
            "Of 59 held-out images, 1 had an error above 0.05. With 95% confidence, at most 7.9% "
            "of images like these have an error above 0.05 (Clopper-Pearson bound). The plan was "
            "adjusted on these images, so the bound is slightly optimistic."
        )

    def test_the_bound_and_a_measured_speedup(self, plan, tmp_path):
        more = dict(
            asked={"speedup": 1.5},
            speedup=1.57,
            bound=0.123,
            images={"calibration": 8, "held_out": 4, "seed": 2},
        )
        text = drawn(changed(plan, **more), tmp_path).text
        confidence = inspect.signature(mean_at_most).parameters["confidence"].default
        bound = f"is at most 0.123, with {confidence:.0%} confidence."
        assert f"The mean over all images like these {bound}" in text
        assert "Measured speed-up of the target over dense: 1.57." in text
        assert "Budget: 1.5 times as fast as dense attention" in text
        assert "Measured speed-up" not in drawn(plan, tmp_path).text

    def test_names_are_escaped(self, plan, tmp_path):
        layers = copy.deepcopy(plan.notes["tuned"]["layers"])
        layers[0]["layer"] = '<i id="x">&amp;$a$'
        layers[0]["heads"][0]["pattern"] = "<b>a</b>"
        family = {**plan.model, "family": "<script>alert(1)</script>"}
        other = replace(changed(plan, layers=layers), model=family)
        found = drawn(other, tmp_path)
        assert not {tag for tag, _ in found.tags} & {"script", "b", "i"}
        for name in ("<script>alert(1)</script>", '<i id="x">&amp;$a$', "<b>a</b>"):
            assert name in found.text

    def test_a_plan_changed_since(self, plan, model, tmp_path):
        assert "changed after tuning" not in drawn(plan, tmp_path).text
        layers = plan.notes["tuned"]["layers"]
        sparse = [
            [i for i, head in enumerate(layer["heads"]) if head["pattern"] != "dense"]
            for layer in layers
        ]
        most = max(range(len(layers)), key=lambda index: len(sparse[index]))
        other = plan.replace(layers=[most], heads=sparse[most][:2], pattern="nearest", sparsity=0.5)
        found = drawn(other, tmp_path, model, images(1)[0], views=100)
        assert "2 heads changed after tuning" in found.text
        assert sum("predicted error" in text for text in found.values("alt")) > 0
        changed = [text for text in found.values("alt") if "after tuning" in text]
        assert len(changed) == 2
        assert not any("predicted error" in text for text in changed)
        assert found.views > 2

    def test_nothing_skipped(self, model, tmp_path):
        plan = bsa.tune(model, images(3), max_error=1e-9, verify=0.5, **SMALL)
        found = drawn(plan, tmp_path, model, images(1)[0])
        assert "The plan skips 0.0% of the blocks" in found.text
        assert found.views == 0

    def test_same_page_again(self, plan, tmp_path):
        pages = []
        for _ in range(2):
            drawn(plan, tmp_path)
            pages.append((tmp_path / "page.html").read_bytes())
        assert pages[0] == pages[1]

    def test_read_from_a_file(self, plan, tmp_path):
        drawn(plan, tmp_path)
        expected = (tmp_path / "page.html").read_bytes()
        plan.save(tmp_path / "plan.json")
        drawn(bsa.SparsityPlan.load(tmp_path / "plan.json"), tmp_path)
        assert (tmp_path / "page.html").read_bytes() == expected


class TestFigures:
    @pytest.mark.parametrize(
        ("pattern", "short"),
        [
            ("dense", "dense"),
            (repr(Pattern("local_window", radius=8)), "local 8"),
            (
                repr(Pattern("local_window", radius=1) | Pattern("strided", stride=4)),
                "local 1\n+ strided 4",
            ),
            (repr(Pattern("special") | Pattern("local_window", radius=0)), "special\n+ local 0"),
            ("something_of_my_own", "something…"),
        ],
    )
    def test_short_names(self, pattern, short):
        assert plots._short(pattern) == short

    def test_labels_do_not_cover_each_other(self):
        points = 60 + 200 * torch.rand(24, 2, generator=torch.Generator().manual_seed(0)).numpy()
        labels = [str(number) for number in range(24)]

        def covered(offsets):
            middles = points + np.array(offsets)
            return [
                (i, j)
                for i in range(24)
                for j in range(i)
                if abs(middles[i, 0] - middles[j, 0]) < 10
                and abs(middles[i, 1] - middles[j, 1]) < 8
            ]

        assert covered(plots._free_places(points, labels)) == []
        assert covered([(8, 8)] * 24)


def attention_row(call, layout, head, query):
    """Return the attention of one query, (N,) float64, from the full softmax."""
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1).double()
    logits = call.q[0].double() @ k[0].transpose(-1, -2) * call.scale  # (H, N, N)
    if call.rel_pos is not None:
        patches = torch.arange(layout.num_patches)
        for term, place in zip(call.rel_pos, (patches // layout.grid[1], patches % layout.grid[1])):
            logits = logits + term[0].double()[..., place]
    return logits.softmax(-1)[head, query]


def calls_of(model, image):
    """Return the attention calls of a model, by layer key."""
    calls = []
    with torch.no_grad(), bsa.observe(model, calls.append):
        model(image)
    return {call.layer.key: call for call in calls}


class TestViews:
    @pytest.mark.parametrize("name", ["plan", "sam_plan"])
    def test_what_one_query_attends_to(self, name, request):
        chosen, its_model = (
            request.getfixturevalue(x) for x in (name, {"plan": "model", "sam_plan": "sam"}[name])
        )
        image, start = models.image(96, 96, batch=2), bsa.inspect(its_model).num_prefix_tokens
        key = chosen.notes["tuned"]["layers"][-1]["key"]
        views = attention_views.head_views(chosen, its_model, image, [(key, 1), (key, 0)])
        call = calls_of(its_model, image)[key]
        assert (call.rel_pos is not None) == (name == "sam_plan")
        for head, view in zip((1, 0), views):
            layout = view.view.layout
            query = start + 6 * 12 + 6
            expected = attention_row(call, layout, head, query)
            assert view.query == (6, 6)
            assert torch.allclose(view.attention.double(), expected, atol=1e-5)
            for other in (
                attention_row(call, layout, head, query + 1),
                attention_row(call, layout, 1 - head, query),
            ):
                assert not torch.allclose(view.attention.double(), other, atol=1e-3)
            of_token = layout.inverse // layout.block_size
            masks = chosen.compile(key, layout)
            mask = masks.block_mask(layout.num_tokens, layout.num_tokens)[0, head]
            kept = float(expected[mask[of_token[query]][of_token]].sum())
            assert view.kept == pytest.approx(kept, abs=1e-5)

    def test_grouped_heads(self):
        layout = TokenLayout(
            (3, 5),
            num_prefix_tokens=2,
            num_suffix_tokens=1,
            order="tile",
            tile=(2, 2),
            block_size=4,
        )
        q, k = (
            torch.randn(1, heads, 18, 4, generator=torch.Generator().manual_seed(heads))
            for heads in (4, 2)
        )
        call = Observation(LayerSpec("a", 0, 4, 4), layout.grid, q, k, k, 0.7, None, None)
        for head in range(4):
            found = attention_views.attention_of(call, layout, head, 1, 3).double()
            assert torch.allclose(found, attention_row(call, layout, head, 2 + 8), atol=1e-6)
            other = attention_row(call, layout, head - 2, 2 + 8)
            assert not torch.allclose(found, other, atol=1e-3)

    def test_how_many(self, plan, model, tmp_path):
        image = images(1)[0]
        sparse = sum(
            head["pattern"] != "dense"
            for layer in plan.notes["tuned"]["layers"]
            for head in layer["heads"]
        )
        for wanted in (0, 1, 3, 100):
            found = drawn(plan, tmp_path, model, image, views=wanted)
            assert found.views == min(wanted, sparse) == len(found.values("src"))
        assert drawn(plan, tmp_path).views == 0

    def test_which_heads(self):
        def layer(*errors):
            names = ["static" if error else "dense" for error in errors]
            heads = [dict(pattern=name, error=error) for name, error in zip(names, errors)]
            return {"heads": heads}

        layers = [layer(9, 8, 7), layer(0, 6, 0), layer(0, 5, 1)]
        assert attention_views.choose_heads(layers, 0) == []
        assert attention_views.choose_heads(layers, 1) == [(0, 0)]
        assert attention_views.choose_heads(layers, 2) == [(0, 0), (2, 2)]
        assert attention_views.choose_heads(layers, 3) == [(0, 0), (1, 1), (2, 2)]
        assert attention_views.choose_heads(layers, 9) == [
            (0, 0),
            (0, 1),
            (0, 2),
            (1, 1),
            (2, 1),
            (2, 2),
        ]

    def test_the_model_is_left_as_it_was(self, plan, model):
        image = images(1)[0]
        model.train()
        model.model.layer[0].eval()
        before = [dict(module.__dict__) for module in model.modules()]
        heads = [("self.1", 0)]
        attention_views.head_views(plan, model, image, heads)
        with pytest.raises(KeyError, match="mine"):
            attention_views.head_views(plan, model, image, heads, lambda *args: {}["mine"])
        assert [dict(module.__dict__) for module in model.modules()] == before
        model.eval()

    def test_photographs(self):
        pixels = torch.randn(2, 3, 4, 6)
        click = torch.zeros(2, 2)
        expected = (pixels[0] - pixels[0].min()) / (pixels[0].max() - pixels[0].min())
        for image in (
            pixels,
            (click, pixels),
            [pixels, click],
            {"a": {"b": click}, "c": (pixels,)},
        ):
            assert torch.allclose(attention_views.pixels_of(image), expected.permute(1, 2, 0))
        assert attention_views.pixels_of(torch.ones(1, 3, 2, 2)).tolist() == [[[0.0] * 3] * 2] * 2

    def test_a_photograph_that_is_not_square(self, model):
        plan = bsa.tune(model, images(2, (64, 96)), sparsity=0.3, order="tile", **SMALL)
        image = images(1, (64, 96))[0]
        (view,) = attention_views.head_views(plan, model, image, [("self.0", 0)])
        assert view.query == (4, 6)
        figure = attention_views.draw(attention_views.pixels_of(image), view)
        width, height = figure.get_size_inches()
        assert height / width == pytest.approx(64 / 96)


class TestWrongInput:
    def test_a_plan_that_was_not_tuned(self, plan, model, tmp_path):
        message = (
            "notes hold {}: expected the results of tune under 'tuned'; make the plan with this "
            "version's bsa.tune"
        )
        older = {key: value for key, value in plan.notes["tuned"].items() if key != "certificate"}
        for notes, holds in (
            ({}, "nothing"),
            ({"mine": 1}, "'mine'"),
            ({"tuned": older}, "'tuned'"),
        ):
            with pytest.raises(ValueError, match=message.format(holds)):
                html_report.report(replace(plan, notes=notes), tmp_path / "page.html")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"image": None},
                "report got a model but no image: views need both; pass image too",
            ),
            ({"model": None}, "report got an image but no model"),
            (
                {"image": torch.zeros(3, 96, 96)},
                r"image is a Tensor without pixels: expected a tensor \(B, 3, h, w\)",
            ),
            ({"views": -1}, "views=-1: expected an integer >= 0"),
            (
                {"target": lambda model, image: image},
                r"target ran no attention of self.\d.*pass the target used for tuning",
            ),
        ],
    )
    def test_options(self, plan, model, options, message, tmp_path):
        (tmp_path / "page.html").write_text("earlier")
        with pytest.raises(ValueError, match=message):
            html_report.report(
                plan, tmp_path / "page.html", **{"model": model, "image": images(1)[0], **options}
            )
        assert (tmp_path / "page.html").read_text() == "earlier"

    def test_another_model(self, plan, model, tmp_path):
        other = bsa.sparsify_(copy.deepcopy(model), plan)
        for given, message in (
            (other, "already has sparse heads"),
            (models.vit(), "this plan is for another model"),
        ):
            with pytest.raises(ValueError, match=message):
                html_report.report(plan, tmp_path / "page.html", given, images(1)[0])

    def test_a_page_that_cannot_be_written(self, plan, tmp_path, monkeypatch):
        with pytest.raises(FileNotFoundError):
            html_report.report(plan, tmp_path / "nowhere" / "page.html")
        (tmp_path / "page.html").write_text("earlier")

        def full(*args):
            raise OSError("no space left")

        monkeypatch.setattr(atomic_write.os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            html_report.report(plan, tmp_path / "page.html")
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
            ("page.html", "earlier")
        ]

    def test_without_matplotlib(self, plan, tmp_path, monkeypatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        message = r"needs matplotlib, which cannot be imported.*pip install 'bsa-vision\[tune\]'"
        with pytest.raises(ImportError, match=message):
            html_report.report(plan, tmp_path / "page.html")

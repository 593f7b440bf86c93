"""Calibration: cross-fitting, token orders, and targets that cannot be calibrated."""

from __future__ import annotations

import pytest
import torch

import bsa_vision as bsa
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.models.features import features
from bsa_vision.tuning import candidates, tune
from bsa_vision.tuning.calibration import Options, _loss, calibrate
from bsa_vision.tuning.search import solve_for
from bsa_vision.tuning.statistics import BlockStatistics, CandidateErrors
from bsa_vision.tuning.store import Calibration, Store
from bsa_vision.tuning.trial import make_plan
from bsa_vision.tuning.tune import layers_to_tune
from tests.helpers import models
from tests.helpers.tuning import SMALL, images


class TestCalibrate:
    def test_planted_heads_are_found(self):
        """Heads whose output is multiplied by 0 are the sparsest ones."""
        model = models.make("dinov3")
        with torch.no_grad():
            for layer in model.model.layer:
                layer.attention.o_proj.weight[:, :12] = 0  # drops the output of head 0
        layout = dict(order="tile", **SMALL)
        layers = layers_to_tune(bsa.inspect(model), None)
        options = Options(layers, candidates.NAMES, features, layout)
        tuned = calibrate(model, images(), Calibration({}), Store(None), options)
        picks = solve_for(tuned, share=0.8)
        density = [
            [options[pick][1].float().mean().item() for options, pick in zip(heads, chosen)]
            for heads, chosen in zip(tuned.options, picks)
        ]
        assert all(layer[0] == min(layer) for layer in density)
        plan = make_plan(tuned, picks)
        assert sum(names[0] != "dense" for names in plan.layers.values()) == 3

    def test_judged_on_images_they_were_not_found_on(self, monkeypatch):
        """Best blocks of each half are evaluated on the other half; the plan's are those of all."""
        model, given, layout = models.make("dinov3"), images(5), dict(order="tile", **SMALL)
        used, add = [], CandidateErrors.add

        def add_and_record(self, call, layout, masks):
            used.append(masks)
            add(self, call, layout, masks)

        monkeypatch.setattr(CandidateErrors, "add", add_and_record)
        options = Options(layers_to_tune(bsa.inspect(model), [1]), ["static"], features, layout)
        calibration = Calibration({})
        tuned = calibrate(model, given, calibration, Store(None), options)
        layout, among = tuned.layout, calibration.compared[0]

        def found_on(some):
            found = BlockStatistics.empty(4, layout, among.shape[-1])

            def add(call):
                if call.layer.index == 1:
                    found.add(call, layout, among)

            with torch.no_grad(), bsa.observe(model, add):
                for image in some:
                    features(model, image)
            heads = candidates.static(candidates.order_of_dropping(found, layout, among), layout)
            return torch.stack([torch.stack([mask for _, mask in head]) for head in heads])

        halves = [found_on(given[1::2]), found_on(given[::2])]
        assert not torch.equal(*halves)
        shape = (*halves[0].shape[:1], 13, *halves[0].shape[2:])  # dense first
        assert [mask.shape for mask in used] == [shape] * 5
        assert all(torch.equal(mask[:, 1:], halves[i % 2]) for i, mask in enumerate(used))
        of_all = torch.stack(
            [torch.stack([mask for _, mask in head[1:]]) for head in tuned.options[0]]
        )
        assert torch.equal(of_all, found_on(given))
        assert calibration.blocks == []  # large tensors are not stored


class TestOrder:
    def test_the_one_that_loses_least(self):
        plan = tune(models.make("dinov3"), images(4), sparsity=0.5, **SMALL)
        orders = plan.report["orders"]
        assert [(order["order"], order["tile"]) for order in orders] == [
            ("raster", [4, 4]),
            ("tile", [4, 4]),
            ("tile", [2, 8]),
        ]
        best = min(orders, key=lambda order: order["lost"])
        assert (plan.order, list(plan.tile)) == (best["order"], best["tile"])
        assert len({order["lost"] for order in orders}) == 3

    def test_lost(self):
        """The loss is that of all but the best blocks; special blocks are never dropped."""
        layout = TokenLayout((8, 6), num_prefix_tokens=2, order="tile", tile=(4, 2), block_size=8)
        statistics = BlockStatistics.empty(2, layout)
        torch.manual_seed(0)
        statistics.drop += torch.rand(statistics.drop.shape)
        special = Pattern("special")(layout)
        expected = 0.0
        for head in statistics.drop:
            ordinary = head[~special].sort().values
            for keep in (0.25, 0.5):
                expected += ordinary[: round((1 - keep) * head.numel())].sum().item() / 2
        assert _loss(statistics, layout, torch.tensor(10.0)) == pytest.approx(expected / 10)

    def test_given(self):
        plan = tune(models.make("dinov3"), images(3), sparsity=0.5, order="raster", **SMALL)
        assert plan.report["orders"] == []


class TestTargets:
    def test_a_target_that_skips_layers(self):
        def first_layers(model, image):
            return model.model.layer[0](
                model.embeddings(image), position_embeddings=model.rope_embeddings(image)
            )

        with pytest.raises(
            ValueError,
            match=r"target ran no attention of model.layer.1.attention, model.layer.2.attention",
        ):
            tune(models.make("dinov3"), images(), sparsity=0.5, target=first_layers, **SMALL)

    @pytest.mark.parametrize(
        "out",
        [lambda x: (x,), lambda x: 0 * x, lambda x: x / 0],
        ids=["tuple", "zeros", "infinite"],
    )
    def test_odd_targets(self, out):
        def target(model, image):
            return out(features(model, image))

        with pytest.raises(ValueError, match="target returned"):
            tune(models.make("dinov3"), images(), sparsity=0.5, target=target, **SMALL)

    def test_a_target_that_runs_nothing(self):
        def target(model, image):
            return image

        with pytest.raises(
            ValueError, match=r"target ran no attention of model.layer.0.attention, model.layer.1"
        ):
            tune(models.make("dinov3"), images(), sparsity=0.5, target=target, **SMALL)

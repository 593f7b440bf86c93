"""The search for a plan: the measured error or speed-up meets the budget."""

from __future__ import annotations

import importlib

import pytest

import bsa_vision as bsa
from bsa_vision.tuning import tune
from bsa_vision.tuning.bounds import mean_at_most
from tests.helpers import models
from tests.helpers.tuning import SMALL, images

SEARCH = importlib.import_module("bsa_vision.tuning.search")


class TestMaxError:
    @pytest.mark.parametrize("wanted", [0.05, 0.2])
    def test_within_an_error(self, wanted):
        model = models.make("dinov3")
        plan = tune(model, images(12), max_error=wanted, **SMALL)
        found = plan.notes["tuned"]
        assert found["measured"] <= found["bound"] <= wanted
        assert found["sparsity"] > 0
        assert found["images_above"] == sum(error > wanted for error in found["errors"])
        assert found["bound"] > 0.7 * wanted  # not needlessly dense
        assert found["bound"] == pytest.approx(mean_at_most(found["errors"]))
        assert found["bound"] > 1.02 * found["measured"]

    def test_an_error_that_anything_keeps(self):
        """The sparsest plan is found without repeated trials."""
        plan = tune(models.make("dinov3"), images(4), max_error=50.0, verify=0.5, **SMALL)
        assert len(plan.report["tried"]) == 2
        assert plan.report["sparsity"] > 0.6


class TestSpeedup:
    def with_times(self, monkeypatch, attention, off=1.0, overhead=0.0):
        """Replace timing and return a latency model: dense runs take 1 s.

        attention  share of the dense time
        off        factor by which the latency model is wrong
        overhead   seconds that any sparse plan costs
        """

        def time_plan(model, plan, image, target, rounds):
            spec = bsa.inspect(model)
            layout = plan.layout(spec, (12, 12))
            masks = [plan.compile(key, layout) for key in plan.layers]
            density = 1 - sum(mask.sparsity for mask in masks) / len(masks)
            return 1 / (1 - attention + attention * density + overhead * (density < 1)), 1.0

        monkeypatch.setattr(SEARCH, "time_plan", time_plan)
        per_pair = off * attention / (3 * 3 * 149**2)  # 3 layers of 3 heads, 149 tokens
        return bsa.Latency("test", 0, per_pair, 0, 0, per_pair, True)

    @pytest.mark.parametrize("off", [1.0, 0.4, 3.0])
    def test_at_a_speedup(self, monkeypatch, off):
        """The measured speed-up of the whole model counts, even if the latency model is wrong."""
        latency = self.with_times(monkeypatch, attention=0.6, off=off)
        plan = tune(models.make("dinov3"), images(), speedup=1.3, latency=latency, **SMALL)
        assert 1.3 <= plan.report["speedup"] < 1.5
        assert plan.report["sparsity"] == pytest.approx(
            (1 - 1 / plan.report["speedup"]) / 0.6, abs=0.01
        )

    def test_a_speedup_that_costs_something_first(self, monkeypatch):
        """If any sparse plan has a fixed cost, no more blocks are skipped than necessary."""
        latency = self.with_times(monkeypatch, attention=0.6, overhead=0.15)
        plan = tune(models.make("dinov3"), images(), speedup=1.1, latency=latency, **SMALL)
        assert 1.1 <= plan.report["speedup"] < 1.25
        assert plan.report["sparsity"] < 0.6

    def test_a_speedup_that_cannot_be_had(self, monkeypatch):
        latency = self.with_times(monkeypatch, attention=0.1)
        with pytest.raises(
            bsa.PlanError,
            match=r"speedup=1.3 cannot be met: the largest measured speed-up is 1\.0\d+, "
            r".* about 1\d% of the time",
        ):
            tune(models.make("dinov3"), images(), speedup=1.3, latency=latency, **SMALL)

    def test_measured_for_real(self):
        """A speed-up of 1 can always be met, by a dense plan if necessary."""
        plan = tune(models.make("dinov3"), images(3), speedup=1.0, **SMALL)
        assert plan.report["speedup"] >= 1.0

    def test_dense_is_as_fast_as_dense(self, monkeypatch):
        """A plan that skips nothing is not timed, so noise does not make it slower than dense."""
        latency = self.with_times(monkeypatch, attention=0.5)
        monkeypatch.setattr(SEARCH, "time_plan", lambda *call: (0.9, 1.0))
        plan = tune(models.make("dinov3"), images(3), speedup=1.0, latency=latency, **SMALL)
        assert plan.report["speedup"] == 1.0
        assert plan.report["sparsity"] == 0.0
        with pytest.raises(bsa.PlanError, match=r"speedup=1\.01 cannot be met"):
            tune(models.make("dinov3"), images(3), speedup=1.01, latency=latency, **SMALL)

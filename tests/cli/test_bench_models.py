"""`bsa-vision bench model`."""

from __future__ import annotations

from dataclasses import replace

import pytest

import bsa_vision as bsa
from bsa_vision.bench import models
from bsa_vision.bench.models import ModelCase, run_model_case
from bsa_vision.models import random_weights
from tests.cli.test_bench import NEAR
from tests.helpers import models as small_models


class TestModels:
    case = ModelCase("tests.helpers.models:vit", NEAR, (64, 96), dense_heads=1, block_size=16)

    @pytest.fixture(autouse=True)
    def far_from_uniform(self, monkeypatch):
        """Use larger random weights; with default ones masks hardly change the output."""
        make = small_models.make
        monkeypatch.setattr(models, "from_factory", lambda path: make(path.rpartition(":")[2]))

    @pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3"])
    def test_checks_and_times(self, name):
        row = run_model_case(replace(self.case, model=f"tests.helpers.models:{name}"), 2)
        sparse = row.implementations["sparse"]
        assert (sparse.status, sparse.reason) == ("ok", "")
        assert sparse.errors["features"].ok
        assert row.checked == "features of the first image, by reference"
        assert len(sparse.timing.seconds) == 2
        tokens = 96 + small_models.START[name]
        assert f", {tokens} tokens, 3 layers of 4 heads of 12." in row.notes[0]
        model = small_models.make(name)
        spec = bsa.inspect(model, (64, 96))
        plan = bsa.uniform_plan(spec, NEAR, dense_heads=1, block_size=16)
        assert row.density == pytest.approx(1 - plan.sparsity(plan.layout(spec)))
        # The masks change the output enough that the check would detect a missing one.
        difference = float(row.notes[-1].split()[-1].rstrip("."))
        assert difference > 10 * sparse.errors["features"].allowed

    def test_a_model_without_its_masks_is_caught(self, monkeypatch):
        real = models.adapters.sparsify_

        def sparsify_(model, plan, backend="auto"):
            return real(model, plan if backend == "reference" else bsa.dense_plan(model), backend)

        monkeypatch.setattr(models.adapters, "sparsify_", sparsify_)
        row = run_model_case(self.case, 1)
        assert row.implementations["sparse"].status == "wrong"
        assert "error of features / allowed: " in row.implementations["sparse"].reason
        assert not row.ok

    def test_checks_that_do_not_fit_in_memory(self, monkeypatch):
        monkeypatch.setattr(models, "free_memory", lambda device: 4 * 97 * 97 * 8 * 5)
        row = run_model_case(replace(self.case, image_size=(64, 64)), 1)
        assert row.checked.endswith("by sdpa")
        monkeypatch.setattr(models, "free_memory", lambda device: 10)
        row = run_model_case(self.case, 1)
        assert row.implementations["sparse"].errors == {}
        assert row.checked.startswith("NOTHING, it needs")

    def test_named_backend_that_cannot_run(self):
        found = run_model_case(replace(self.case, backend="kernel"), 1).implementations["sparse"]
        assert found.status == "not run"
        assert "kernel" in found.reason

    def test_sam(self, monkeypatch):
        small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=48)
        small |= dict(window_size=5, global_attn_indexes=[1], output_channels=16)
        monkeypatch.setitem(random_weights.BUILT_IN, "sam", ("SamVision", 8, small))
        case = ModelCase("sam", NEAR, (96, 96), block_size=16)
        found = run_model_case(case, 1).implementations["sparse"]
        assert (found.status, found.reason) == ("ok", "")
        with pytest.raises(ValueError, match=r"model 'sam' takes square images"):
            run_model_case(replace(case, image_size=(96, 64)), 1)

    def test_weights_of_built_in_models_give_wide_logits(self, monkeypatch):
        tiny = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=4)
        tiny |= dict(intermediate_size=96)
        monkeypatch.setitem(random_weights.BUILT_IN, "vit", ("ViT", 8, tiny))
        model = random_weights.random_model("vit", (64, 64)).eval()
        logits = small_models.attention_logits(model, small_models.image())
        assert min(layer.std().item() for layer in logits) >= 1

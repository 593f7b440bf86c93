"""`bsa.observe`, which gives the tuner the inputs of attention calls."""

from __future__ import annotations

import pytest
import torch

import bsa_vision as bsa
from tests.helpers import models, sam_models
from tests.helpers.errors import relative_error


class TestObserve:
    @pytest.mark.parametrize("name", ["vit", "dinov3", "clip", "siglip"])
    def test_what_is_seen_is_what_attention_gets(self, name):
        model, calls = models.make(name), []
        before = [dict(module.__dict__) for module in model.modules()]
        with torch.no_grad():
            expected = models.features(model, models.image())
            with bsa.observe(model, calls.append):
                out = models.features(model, models.image())
        assert relative_error(out, expected) < 1e-5
        assert [call.layer.key for call in calls] == ["self.0", "self.1", "self.2"]
        logits = models.attention_logits(model, models.image())
        for call, expected_logits in zip(calls, logits):
            found = call.q @ call.k.transpose(-1, -2) * call.scale
            assert torch.allclose(found, expected_logits, atol=1e-4)
            assert call.weight.shape == (48, 48)
        assert [dict(module.__dict__) for module in model.modules()] == before

    def test_relative_position(self):
        model, calls = sam_models.make("segment_anything"), []
        with torch.no_grad(), bsa.observe(model, calls.append):
            model(sam_models.image())
        assert all(call.rel_pos is not None for call in calls)

    def test_the_model_comes_back_after_an_error(self):
        model = models.make("vit")
        before = [dict(module.__dict__) for module in model.modules()]

        def fail(call):
            raise KeyError("mine")

        with pytest.raises(KeyError), bsa.observe(model, fail):
            models.features(model, models.image())
        assert [dict(module.__dict__) for module in model.modules()] == before

    def test_calls_outside_the_contract(self):
        model = models.make("vit")
        with (
            pytest.raises(bsa.BackendUnavailable, match="an attention mask was passed"),
            bsa.observe(model, lambda call: None),
        ):
            models.features(model, models.image(), attention_mask=torch.arange(65)[None] < 60)

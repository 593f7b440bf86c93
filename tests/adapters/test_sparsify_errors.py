"""Models and plans that `sparsify_` refuses, and its messages."""

from __future__ import annotations

import pytest
import torch

import bsa_vision as bsa
from bsa_vision.adapters.swap.sparse_layer import layers_of
from bsa_vision.masks import generate_vit_hybrid_mask
from tests.adapters.test_sparsify import sparse_plan
from tests.helpers.models import features, image, make


class TestErrors:
    def test_another_model(self):
        plan = sparse_plan(make("vit"))
        model = make("dinov2")
        with pytest.raises(
            bsa.PlanError, match=r"another model \(family: plan 'vit', model 'dinov2'\)"
        ):
            bsa.sparsify_(model, plan)
        with pytest.raises(bsa.PlanError, match="depth: plan 3, model 2"):
            bsa.sparsify_(make("vit", num_hidden_layers=2), plan)
        with pytest.raises(
            bsa.PlanError, match=r"heads: plan 4, model 2.*head_dim: plan 12, model 24"
        ):
            bsa.sparsify_(make("vit", num_attention_heads=2), plan)
        assert not layers_of(model)

    def test_what_is_not_a_model_or_plan(self):
        model = make("vit")
        for wrong in ("local_window", "no-such-plan.json"):
            with pytest.raises(
                FileNotFoundError,
                match=r"no such file; pass a SparsityPlan or the path of a saved one",
            ):
                bsa.sparsify_(model, wrong)
        for wrong in (None, {}):
            with pytest.raises(
                TypeError, match=r"plan is a .*: expected a SparsityPlan.*uniform_plan"
            ):
                bsa.sparsify_(model, wrong)
        for function in (bsa.restore_, lambda m: bsa.dense(m).__enter__()):
            with pytest.raises(TypeError, match=r"model is a str: expected a torch.nn.Module"):
                function("vit")
        for size in ((64,), 64.0, "64", (64.0, 64.0)):
            with pytest.raises(ValueError, match=r"image_size=.*expected pixels, an int or"):
                bsa.inspect(model, size)
        with pytest.raises(
            TypeError, match=r"spec is a ViTModel: expected a ModelSpec; pass bsa.inspect"
        ):
            bsa.SparsityPlan.from_head_masks(model, {})

    def test_twice_and_never(self):
        model = make("vit")
        for function in (bsa.restore_, lambda m: bsa.dense(m).__enter__()):
            with pytest.raises(ValueError, match=r"no sparse heads.*sparsify_"):
                function(model)
        bsa.sparsify_(model, sparse_plan(model))
        with pytest.raises(ValueError, match=r"already has sparse heads.*restore_"):
            bsa.sparsify_(model, sparse_plan(model))

    def test_a_model_without_sparse_heads_is_described_as_it_is(self):
        model = make("vit")
        before = [dict(module.__dict__) for module in model.modules()]
        report = bsa.describe(model)
        assert [layer.backend for layer in report.layers] == ["original"] * 3
        assert (report.sparsity, report.gain) == (0, 1)
        assert report.cost.ceiling() > 1
        assert report.left == ()  # the described layers are not listed
        assert [dict(module.__dict__) for module in model.modules()] == before

    def test_unsupported_models(self):
        with pytest.raises(
            bsa.PlanError,
            match=r"Linear has no supported attention layer \(found: none\)\. Supported: .*timm",
        ):
            bsa.inspect(torch.nn.Linear(2, 2))
        with pytest.raises(bsa.PlanError, match="found: 1 x MultiheadAttention"):
            bsa.inspect(torch.nn.TransformerEncoderLayer(8, 2))
        with pytest.raises(TypeError, match=r"model is a str: expected a torch.nn.Module"):
            bsa.inspect("dinov3")
        with pytest.raises(
            bsa.PlanError,
            match=r"holds 2 encoders: vit \(0.layers\), dinov3 .*pass these modules one at a time",
        ):
            bsa.inspect(torch.nn.ModuleList([make("vit"), make("dinov3")]))

    def test_options(self):
        model = make("vit")
        plan = sparse_plan(model)
        with pytest.raises(ValueError, match="backend='fast': allowed are 'auto', 'kernel'"):
            bsa.sparsify_(model, plan, backend="fast")
        with pytest.raises(
            ValueError, match="on_unsupported='ignore': allowed are 'fallback' and 'error'"
        ):
            bsa.sparsify_(model, plan, on_unsupported="ignore")
        with pytest.raises(bsa.BackendUnavailable, match="'kernel' cannot run this call"):
            bsa.sparsify_(model, plan, backend="kernel")
        with pytest.raises(
            ValueError,
            match=r"image_size=100: both sides must be multiples of the patch size \(8, 8\)",
        ):
            bsa.inspect(model, image_size=100)
        assert not layers_of(model)
        assert not model.embeddings._forward_pre_hooks

    def test_a_pattern_that_fails_leaves_the_model_untouched(self):
        model = make("vit")
        before = features(model, image())

        def wrong(layout):
            return torch.ones(2, 2)

        def broken(layout):
            raise KeyError("oops")

        plan = bsa.dense_plan(model)
        with pytest.raises(
            bsa.PlanError,
            match=r"'wrong' returned torch.float32 of shape \(2, 2\): expected torch.bool",
        ):
            bsa.sparsify_(model, plan.replace(layers=[2], pattern=wrong))
        with pytest.raises(
            bsa.PlanError, match=r"layer 'self.1', head 0, pattern 'broken': KeyError"
        ):
            bsa.sparsify_(model, plan.replace(layers=[1], pattern=broken))
        assert torch.equal(features(model, image()), before)
        assert not layers_of(model)

    def test_static_masks_fit_one_size(self):
        model = make("dinov2")
        hm = bsa.HeadMasks(
            *generate_vit_hybrid_mask(64, 8, 8, 1, 4, num_global_heads=1), block_size=8
        )
        bsa.sparsify_(model, bsa.SparsityPlan.from_head_masks(bsa.inspect(model), {"self.0": hm}))
        features(model, image())
        with pytest.raises(
            bsa.PlanError, match=r"made for TokenLayout\(grid=\(8, 8\).*fits one layout only"
        ):
            features(model, image(80, 64))

"""`tune` as a whole: kinds of models, options, and wrong input."""

from __future__ import annotations

import sys

import pytest
import torch

import bsa_vision as bsa
from bsa_vision.models.features import features
from bsa_vision.tuning import tune
from tests.helpers import models, sam2_models, sam_models, timm_models
from tests.helpers.errors import relative_error
from tests.helpers.tuning import SMALL, images


def calibration_indices(count, verify=1 / 3, seed=0):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[max(1, round(verify * count)) :])


class TestTune:
    @pytest.mark.parametrize(
        ("make", "picture", "target"),
        [
            (lambda: models.make("dinov3"), lambda seed: models.image(96, 96, seed=seed), features),
            (
                lambda: timm_models.make("vit, not fused"),
                lambda seed: timm_models.image(batch=1) + seed / 10,
                features,
            ),
            (
                lambda: sam_models.make("create_encoder"),
                lambda seed: sam_models.image(batch=1) + seed / 10,
                features,
            ),
            (
                lambda: sam2_models.make("sam2"),
                lambda seed: sam2_models.image() + seed / 10,
                sam2_models.features,
            ),
            (
                lambda: models.make("dinov3").bfloat16(),
                lambda seed: models.image(96, 96, seed=seed).bfloat16(),
                features,
            ),
            (
                lambda: models.make("dinov3"),
                lambda seed: torch.cat([models.image(96, 96, seed=seed + 9 * i) for i in range(3)]),
                features,
            ),
        ],
        ids=[
            "transformers",
            "timm",
            "bsa_vision sam",
            "sam2, two images at once",
            "bfloat16",
            "three images at once",
        ],
    )
    def test_at_a_sparsity(self, make, picture, target):
        model, pictures = make(), [picture(seed) for seed in range(4)]
        kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
        plan = tune(model, pictures, sparsity=0.4, target=target, **SMALL)
        assert [type(module) for module in model.modules()] == kinds
        assert list(model.state_dict()) == keys
        found = plan.notes["tuned"]
        assert 0.4 - 1e-9 <= found["sparsity"] < 0.55
        assert found["images"] == {"calibration": 3, "held_out": 1, "seed": 0}
        with torch.no_grad():
            (held_out,) = {*range(4)} - {*calibration_indices(4)}
            image = pictures[held_out]
            dense = target(model, image)
            bsa.sparsify_(model, plan)
            error = relative_error(target(model, image).double(), dense.double())
            assert error == pytest.approx(found["errors"][0], rel=1e-3)

    def test_while_training(self):
        """Tuning runs in eval mode and restores the training mode of every module."""
        model = models.make("dinov3").train()
        model.model.layer[0].eval()
        before = [module.training for module in model.modules()]
        plan = tune(model, images(4), sparsity=0.4, **SMALL)
        assert [module.training for module in model.modules()] == before
        assert plan == tune(models.make("dinov3"), images(4), sparsity=0.4, **SMALL)

    def test_better_than_uniform_plans(self):
        """The tuned plan is better than uniform plans at equal sparsity, on new images."""
        model = models.make("dinov3")
        plan = tune(model, images(8), sparsity=0.5, **SMALL)
        realised = plan.notes["tuned"]["sparsity"]
        others = [bsa.uniform_plan(model, "random_blocks", sparsity=realised, **SMALL)]
        others += [bsa.uniform_plan(model, "nearest", sparsity=realised, **SMALL)]
        new = [models.image(96, 96, seed=seed) for seed in range(100, 106)]
        with torch.no_grad():
            dense = [features(model, image) for image in new]

            def error(plan):
                bsa.sparsify_(model, plan)
                found = [
                    relative_error(features(model, image), out) for image, out in zip(new, dense)
                ]
                bsa.restore_(model)
                return sum(found) / len(found)

            assert error(plan) < min(map(error, others))

    def test_the_target_decides(self):
        """If the target is only the first prefix token, other heads matter."""
        model = models.make("dinov3")
        plans = [
            tune(model, images(), sparsity=0.5, target=target, **SMALL)
            for target in (features, lambda model, image: features(model, image)[:, :1])
        ]
        assert plans[0].layers != plans[1].layers or plans[0].patterns != plans[1].patterns

    def test_same_seed_same_plan(self):
        model = models.make("vit")
        options = dict(sparsity=0.3, tile=(2, 4), block_size=8)
        plans = [tune(model, images(size=(64, 64)), **options) for _ in range(2)]
        assert plans[0] == plans[1]

    def test_only_some_layers(self):
        model = models.make("dinov3")
        name = bsa.inspect(model).layers[1].name
        plan = tune(model, images(), sparsity=0.5, layers=[name], **SMALL)
        assert {key for key, names in plan.layers.items() if set(names) != {"dense"}} == {"self.1"}

    def test_saved_and_read(self, tmp_path):
        options = dict(sparsity=0.3, tile=(2, 4), block_size=8)
        plan = tune(models.make("vit"), images(3, (64, 64)), **options)
        plan.save(tmp_path / "plan.json")
        assert bsa.SparsityPlan.load(tmp_path / "plan.json") == plan


class TestWrongInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "tune got no budget: exactly one of sparsity, max_error, speedup"),
            ({"sparsity": 0.5, "max_error": 0.1}, "tune got sparsity, max_error"),
            ({"sparsity": 1.0}, "sparsity=1.0: expected a fraction from 0 to below 1"),
            ({"max_error": 0}, "max_error=0: expected an error above 0"),
            ({"speedup": 0.5}, "speedup=0.5: expected at least 1"),
            (
                {"sparsity": 0.99},
                r"sparsity=0.99 cannot be met with these candidates: at most 0\.\d+ is possible",
            ),
            ({"sparsity": 0.5, "candidates": ["locl"]}, "allowed are static, local_window"),
            ({"sparsity": 0.5, "layers": [9]}, r"layers=\[9\]: allowed are the layers that attend"),
            (
                {"sparsity": 0.5, "layers": ["model.layer.1.atention"]},
                "nearest are .*model.layer.1.attention",
            ),
            ({"sparsity": 0.5, "verify": 1.0}, "verify=1.0: expected the share"),
            (
                {"max_error": 0.1, "verify": 0.1},
                "a bound on the mean error needs at least 2 held-out images",
            ),
            ({"max_error": 1e-9, "verify": 0.5}, "max_error=1e-09"),
        ],
    )
    def test_budgets_and_options(self, options, message):
        model = models.make("dinov3")
        before = [dict(module.__dict__) for module in model.modules()]
        if options.get("max_error") == 1e-9:  # met by a dense plan
            assert tune(model, images(), **options, **SMALL).notes["tuned"]["sparsity"] == 0
        else:
            with pytest.raises(ValueError, match=message):
                tune(model, images(), **options, **SMALL)
        assert [dict(module.__dict__) for module in model.modules()] == before

    def test_images(self):
        model = models.make("dinov3")
        for few in ([], images(1)):
            with pytest.raises(ValueError, match=f"{len(few)} images: at least 2 are needed"):
                tune(model, few, sparsity=0.5)
        given = [models.image(*size) for size in ((96, 96), (64, 96), (64, 64))]
        with pytest.raises(
            ValueError,
            match="images of 64 x 64 and 64 x 96 and 96 x 96 pixels: a plan is tuned for one image",
        ):
            tune(model, given, sparsity=0.5, **SMALL)
        broken = images(3)
        for image in broken:
            image[:, :, 5, 5] = torch.nan
        with pytest.raises(
            ValueError, match="features of norm nan for these images: they must be finite"
        ):
            tune(model, broken, sparsity=0.5, **SMALL)
        bsa.dense_plan(model)  # raises for models with sparse heads
        assert not [m for m in model.modules() if "_bsa_layer" in m.__dict__]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                lambda: torch.cat(images(3)),
                r"images hold Tensor \(3, 96, 96\): expected a list of tensors",
            ),
            (
                lambda: [image.numpy() for image in images(3)],
                r"images hold ndarray \(1, 3, 96, 96\)",
            ),
            (lambda: [{"pixels": image} for image in images(3)], "images hold dict"),
        ],
    )
    def test_other_things_than_images(self, given, message):
        with pytest.raises(ValueError, match=message):
            tune(models.make("dinov3"), given(), sparsity=0.5, **SMALL)

    def test_a_layer_named_twice(self):
        model = models.make("dinov3")
        plans = [
            tune(model, images(), sparsity=0.4, layers=layers, **SMALL)
            for layers in ([0, "self.0"], [0])
        ]
        assert plans[0] == plans[1]

    @pytest.mark.parametrize("name", ["scipy.optimize", "safetensors.torch"])
    def test_without_what_it_needs(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install 'bsa-vision\[tune\]'"):
            tune(models.make("dinov3"), images(), sparsity=0.5, **SMALL)

    def test_a_model_with_sparse_heads(self):
        model = models.make("dinov3")
        bsa.sparsify_(model, bsa.uniform_plan(model, "axial", **SMALL))
        with pytest.raises(ValueError, match="already has sparse heads"):
            tune(model, images(), sparsity=0.5, **SMALL)

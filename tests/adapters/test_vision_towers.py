"""Vision towers in transformers with windows, padding masks, or a text tower beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bsa_vision as bsa
from tests.helpers.errors import relative_error
from tests.helpers.models import features, image, make, siglip2

PLAN = dict(radius=1, block_size=8, tile=(2, 4))


class TestSam3:
    def test_dense_and_sparse(self):
        model = make("sam3")
        assert [layer.window for layer in bsa.inspect(model).layers] == [3, 0, 0]
        plan = bsa.uniform_plan(model, "local_window", **PLAN)
        with torch.no_grad():
            expected = features(model, image())
            outs = {}
            for backend in ("auto", "sdpa", "reference"):
                outs[backend] = features(bsa.sparsify_(model, plan, backend=backend), image())
                bsa.restore_(model)
            assert torch.equal(features(model, image()), expected)
            bsa.sparsify_(model, bsa.dense_plan(model), backend="gather")  # windowed layers too
            assert relative_error(features(model, image()), expected) < 1e-5
            torch.compiler.reset()
            bsa.sparsify_(bsa.restore_(model), plan)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert relative_error(features(compiled, image()), outs["auto"]) < 1e-5
        assert relative_error(outs["auto"], outs["reference"]) < 1e-5
        assert relative_error(outs["sdpa"], outs["reference"]) < 1e-5
        assert relative_error(outs["auto"], expected) > 1e-2

    def test_windowed_layers_stay_dense(self):
        model = make("sam3")
        with pytest.raises(bsa.PlanError, match="attends within windows of 3 x 3 patches"):
            bsa.uniform_plan(model, "local_window", layers=0)


class TestNaFlex:
    """SigLIP 2: images as patches, padded to the largest number of patches."""

    def inputs(self, grids):
        torch.manual_seed(2)
        max_patches = max(height * width for height, width in grids)
        mask = torch.zeros(len(grids), max_patches, dtype=torch.long)
        for row, (height, width) in zip(mask, grids):
            row[: height * width] = 1
        pixels = torch.randn(len(grids), max_patches, 3 * 8 * 8)
        return dict(
            pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=torch.tensor(grids)
        )

    def test_padding_is_honoured_and_counted(self):
        model, inputs = make("siglip2"), self.inputs([(6, 8), (4, 5)])
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
            bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", **PLAN))
            with pytest.warns(UserWarning, match="an attention mask was passed"):
                assert torch.equal(model(**inputs).last_hidden_state, expected)
            assert bsa.describe(model).layers[0].fallbacks == {"an attention mask was passed": 1}

    def test_the_grid_is_that_of_the_shapes(self):
        model, inputs = make("siglip2"), self.inputs([(4, 10), (4, 10)])
        inputs["pixel_attention_mask"] = None
        plan = bsa.uniform_plan(model, "local_window", **PLAN)
        with torch.no_grad():
            outs = []
            for backend in ("auto", "reference"):
                outs.append(bsa.sparsify_(model, plan, backend=backend)(**inputs).last_hidden_state)
                assert bsa.describe(model).grid == (4, 10)
                bsa.restore_(model)
            turned = {**inputs, "spatial_shapes": torch.tensor([[4, 10], [10, 4]])}
            dense = model(**turned).last_hidden_state
            bsa.sparsify_(model, plan)
            model(**inputs)  # its grid must not be used for the next input
            with pytest.warns(UserWarning, match="the grid of this input is unknown"):
                assert torch.equal(model(**turned).last_hidden_state, dense)
        assert relative_error(outs[0], outs[1]) < 1e-5


class TestComposite:
    @pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
    def test_only_the_vision_tower(self, family):
        model = two_towers(family)
        text = {name: type(module) for name, module in model.named_modules() if "text" in name}
        configs = {
            name: module.config
            for name, module in model.named_modules()
            if hasattr(module, "config")
        }
        before = copy.deepcopy({name: config.to_dict() for name, config in configs.items()})
        spec = bsa.inspect(model)
        assert spec.family == family
        assert all("vision" in layer.name for layer in spec.layers)
        bsa.sparsify_(model, bsa.uniform_plan(model, "axial", block_size=8))
        ids = torch.randint(0, 50, (1, 7))
        tower = model.get_submodule("text_model")
        assert torch.equal(
            tower(ids).last_hidden_state, copy.deepcopy(tower)(ids).last_hidden_state
        )
        assert {
            name: type(module) for name, module in model.named_modules() if "text" in name
        } == text
        assert any("text_model" in left.where for left in bsa.describe(model).left)
        bsa.restore_(model)
        assert all(
            module.config is configs[name]
            for name, module in model.named_modules()
            if name in configs
        )
        assert {name: config.to_dict() for name, config in configs.items()} == before

    def test_each_layers_own_implementation_comes_back(self):
        model = two_towers("clip")
        model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
        bsa.restore_(bsa.sparsify_(model, bsa.uniform_plan(model, "axial", block_size=8)))
        assert model.vision_model.config._attn_implementation == "eager"
        assert model.text_model.config._attn_implementation == "sdpa"


def two_towers(family) -> nn.Module:
    import transformers

    name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[family]
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    text = dict(sizes, vocab_size=60, max_position_embeddings=16, projection_size=48)
    vision = dict(
        sizes, patch_size=8, **({"num_patches": 64} if family == "siglip2" else {"image_size": 64})
    )
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    return getattr(transformers, f"{name}Model")(config).eval()


def test_siglip2_is_square_by_default():
    assert bsa.inspect(siglip2(num_patches=256)).grid == (16, 16)

"""SAM's image encoder in transformers: exact with a dense plan, sparse in its global layers, in every class that shares it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.parametrize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bsa_vision as bsa
from bsa_vision.adapters.layer import layers_of
from bsa_vision.rel_pos import resize_table

# 12 x 12 patches: windows of 5 need padding. Layers 1 and 3 are global.
SMALL = dict(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=96,
    patch_size=8,
    window_size=5,
    global_attn_indexes=[1, 3],
    output_channels=16,
    mlp_dim=48,
)


def sam(**changes):
    from transformers import SamVisionConfig, SamVisionModel

    return SamVisionModel(SamVisionConfig(**{**SMALL, **changes}))


def sam_hq(**changes):
    from transformers import SamHQVisionConfig, SamHQVisionModel

    return SamHQVisionModel(SamHQVisionConfig(**{**SMALL, **changes}))


def deepseek_ocr2(**changes):
    from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as module
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2SamVisionConfig

    return module.DeepseekOcr2SamVisionEncoder(DeepseekOcr2SamVisionConfig(**{**SMALL, **changes}))


MODELS = {"sam": sam, "sam_hq": sam_hq, "deepseek_ocr2": deepseek_ocr2}


def make(name="sam", attention="sdpa", seed=0, **changes) -> nn.Module:
    """In eval mode, every weight redrawn: fresh relative tables are zero, and everything else nearly so."""
    torch.manual_seed(seed)
    model = MODELS[name](attn_implementation=attention, **changes).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "rel_pos" in key or "pos_embed" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif parameter.dim() >= 2:
                gain = 1.6 if "qkv" in key else 0.7
                parameter.copy_(torch.randn_like(parameter) * gain * parameter[0].numel() ** -0.5)
            elif "bias" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def image(height=96, width=96, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def features(model, pixels, **options):
    return model(pixels, **options).last_hidden_state


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(params=[(name, attention) for name in MODELS for attention in ("sdpa", "eager")], ids="-".join)
def model(request):
    return make(*request.param)


class TestExact:
    def test_terms_are_wide(self, model):
        """What the other tests rest on: logits and relative terms of standard deviation 1 and more, in every layer."""
        seen = []
        for module in model.modules():
            if hasattr(module, "get_decomposed_rel_pos"):
                original = module.get_decomposed_rel_pos

                def record(query, *args, original=original):
                    seen.append((query.std(), original(query, *args).std()))
                    return original(query, *args)

                module.get_decomposed_rel_pos = record
        features(model, image())
        assert len(seen) == 4
        assert all(min(q, rel) > 1 for q, rel in seen)

    def test_dense_plan_changes_nothing(self, model):
        with torch.no_grad():
            expected = features(model, image())
            keys = list(model.state_dict())
            bsa.sparsify_(model, bsa.dense_plan(model))
            assert list(model.state_dict()) == keys
            assert relative(features(model, image()), expected) < 1e-5
            assert {layer.untouched for layer in layers_of(model)} == {False}
            before = [dict(module.__dict__) for module in model.modules()]
            with bsa.dense(model):
                assert torch.equal(features(model, image()), expected)
            assert before == [dict(module.__dict__) for module in model.modules()]

    @pytest.mark.parametrize("backend", ["reference", "sdpa", "gather"])
    def test_every_backend(self, backend):
        model = make()
        with torch.no_grad():
            expected = features(model, image())
            bsa.sparsify_(model, bsa.dense_plan(model), backend=backend)
            assert relative(features(model, image()), expected) < 1e-5

    @pytest.mark.parametrize("layer", ["windowed", "global"])
    def test_twin_without_the_relative_term(self, layer):
        model = make()
        with torch.no_grad():
            expected = features(model, image())
            bsa.sparsify_(model, bsa.dense_plan(model))
            block = model.get_submodule("layers" if hasattr(model, "layers") else "vision_encoder.layers")
            block[0 if layer == "windowed" else 1].attn.use_rel_pos = False
            assert relative(features(model, image()), expected) > 1e-2

    def test_restore_is_bit_exact(self, model):
        classes = [type(module) for module in model.modules()]
        dicts = [set(module.__dict__) for module in model.modules()]
        with torch.no_grad():
            expected = features(model, image())
            bsa.restore_(bsa.sparsify_(model, bsa.dense_plan(model)))
            assert torch.equal(features(model, image()), expected)
        assert [type(module) for module in model.modules()] == classes
        assert [set(module.__dict__) for module in model.modules()] == dicts

    def test_without_relative_position(self):
        model = make(use_rel_pos=False)
        with torch.no_grad():
            expected = features(model, image())
            assert relative(features(bsa.sparsify_(model, bsa.dense_plan(model)), image()), expected) < 1e-5

    @pytest.mark.parametrize("size", [(64, 64), (128, 128)])
    def test_other_resolutions(self, size):
        """DeepSeek-OCR 2 takes other square sizes: relative tables are interpolated as the original does it."""
        model = make("deepseek_ocr2")
        with torch.no_grad():
            expected = features(model, image(*size))
            bsa.sparsify_(model, bsa.dense_plan(model))
            assert relative(features(model, image(*size)), expected) < 1e-5

    def test_a_size_the_model_cannot_take_is_its_own_error(self):
        model = bsa.sparsify_(make(), bsa.dense_plan(make()))
        with pytest.raises(ValueError, match=r"doesn't match model"):
            model(image(64, 64))

    def test_nothing_is_tokens_by_tokens(self):
        """No operation of a swapped forward makes a tensor of B x H x N x N elements; of the original, one does."""
        model, largest = make(), []

        class Largest(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                largest.extend(x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
                return out

        matrix = 1 * 2 * 144 * 144 * 4
        with torch.no_grad(), Largest():
            features(model, image(batch=1))
            assert max(largest) >= matrix
            bsa.sparsify_(model, bsa.dense_plan(model))
            largest.clear()
            features(model, image(batch=1))
        assert max(largest) < matrix

    def test_gradients(self):
        model, twin = make(), make()
        bsa.sparsify_(twin, bsa.dense_plan(twin))
        for each in (model, twin):
            features(each, image()).square().mean().backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters()):
            assert relative(b.grad, a.grad) < 1e-4, name
            if "rel_pos" in name:
                assert a.grad.norm() > 0

    def test_compile_fullgraph(self):
        model = make()
        with torch.no_grad():
            bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", radius=2, order="raster", block_size=16))
            expected = features(model, image())
            encoder = getattr(model, "vision_encoder", model)
            compiled = torch.compile(lambda x: encoder.layers[1](x), fullgraph=True, backend="aot_eager")
            x = torch.randn(2, 12, 12, 32)
            assert relative(compiled(x), encoder.layers[1](x)) < 1e-6
            assert torch.equal(features(model, image()), expected)


class TestSparse:
    def plan(self, model, **options):
        return bsa.uniform_plan(model, "local_window", radius=2, order="tile", tile=(4, 4), block_size=16, **options)

    def test_global_layers_only(self, model):
        spec = bsa.inspect(model)
        assert [layer.window for layer in spec.layers] == [5, 0, 5, 0]
        plan = self.plan(model)
        assert [set(names) == {"dense"} for names in plan.layers.values()] == [True, False, True, False]

    def test_equals_masked_arithmetic_and_differs_from_dense(self, model):
        with torch.no_grad():
            dense = features(model, image())
            plan = self.plan(model)
            outs = {}
            for backend in ("auto", "sdpa", "reference"):
                outs[backend] = features(bsa.sparsify_(model, plan, backend=backend), image())
                bsa.restore_(model)
        assert relative(outs["auto"], outs["sdpa"]) < 1e-5
        assert relative(outs["auto"], outs["reference"]) < 1e-5
        assert relative(outs["auto"], dense) > 1e-2

    def test_one_plan_for_every_code_base(self, tmp_path):
        self.plan(make()).save(tmp_path / "plan.json")
        plan = bsa.SparsityPlan.load(tmp_path / "plan.json")
        outs = []
        for name in ("sam", "sam_hq"):
            model = make(name)
            encoder, own = getattr(model, "vision_encoder", model), make("sam")
            encoder.load_state_dict(getattr(own, "vision_encoder", own).state_dict())
            with torch.no_grad():
                outs.append(features(bsa.sparsify_(model, plan), image()))
        assert relative(outs[1], outs[0]) < 1e-6

    def test_copies_and_pickles(self, model):
        with torch.no_grad():
            bsa.sparsify_(model, self.plan(model))
            expected = features(model, image())
            saved = io.BytesIO()
            torch.save(model, saved)
            saved.seek(0)
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
            for other in copies:
                assert torch.equal(features(other, image()), expected)
            originals = {type(module).__name__ for module in bsa.restore_(copies[1]).modules()}
            assert not any(name.startswith("Sparse") for name in originals)
            assert torch.equal(features(model, image()), expected)

    def test_a_whole_sam_has_its_decoder_left_alone(self):
        from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

        prompts = SamPromptEncoderConfig(hidden_size=16, image_size=96, patch_size=8)
        decoder = SamMaskDecoderConfig(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16)  # fmt: skip
        config = SamConfig(
            vision_config=SamVisionConfig(**SMALL, num_pos_feats=8),
            prompt_encoder_config=prompts,
            mask_decoder_config=decoder,
        )
        model = SamModel(config).eval()
        decoder_classes = [type(module) for module in model.mask_decoder.modules()]
        points = torch.tensor([[[[40.0, 50.0]]]])
        with torch.no_grad():
            expected = model(pixel_values=image(batch=1), input_points=points).pred_masks
            bsa.sparsify_(model, bsa.dense_plan(model))
            got = model(pixel_values=image(batch=1), input_points=points).pred_masks
        assert relative(got, expected) < 1e-4
        assert [type(module) for module in model.mask_decoder.modules()] == decoder_classes

    def test_describe(self):
        model = make()
        report = bsa.describe(bsa.sparsify_(model, self.plan(model)))
        assert [layer.tokens for layer in report.layers] == [25, 144, 25, 144]
        assert [bool(layer.sparsity) for layer in report.layers] == [False, True, False, True]
        assert {layer.backend for layer in report.layers} == {"gather"}


class TestOutsideTheContract:
    def test_attention_weights(self):
        model = make(attention="eager")
        with torch.no_grad():
            expected = model(image(), output_attentions=True).attentions
            bsa.sparsify_(model, bsa.dense_plan(model))
            with pytest.warns(UserWarning, match="attention weights were asked for"):
                got = model(image(), output_attentions=True).attentions
            assert len(got) == len(expected) == 4
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
            assert bsa.describe(model).layers[0].fallbacks == {"attention weights were asked for": 1}
            bsa.restore_(model)
            bsa.sparsify_(model, bsa.dense_plan(model), on_unsupported="error")
            with pytest.raises(bsa.BackendUnavailable, match="attention weights were asked for"):
                model(image(), output_attentions=True)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_dropout_of_weights_as_the_class_does_it(self, attention):
        """The eager class drops attention weights while training, the SDPA class ignores the setting; so do we."""
        model = make(attention=attention, attention_dropout=0.5).train()
        bsa.sparsify_(model, bsa.dense_plan(model))
        with torch.no_grad():
            assert torch.equal(features(model, image()), features(model, image())) == (attention == "sdpa")


class TestErrors:
    def test_a_class_that_something_else_changed_since(self):
        """Parametrizations change classes as well; restoring must not undo theirs in silence, nor half of ours."""
        model = make()
        bsa.sparsify_(model, bsa.dense_plan(model))
        attention = next(module for module in model.modules() if hasattr(module, "rel_pos_h"))
        nn.utils.parametrize.register_parametrization(attention, "rel_pos_h", nn.Identity())
        classes = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=r"became a Parametrized.* since sparsify_.*remove it first"):
            bsa.restore_(model)
        assert [type(module) for module in model.modules()] == classes
        nn.utils.parametrize.remove_parametrizations(attention, "rel_pos_h")
        bsa.restore_(model)
        assert not layers_of(model)

    @pytest.mark.parametrize("layers", [0, ["self.2"], [0, 1]])
    def test_a_windowed_layer_asked_for(self, layers):
        with pytest.raises(
            bsa.PlanError,
            match=r"layer 'self\.[02]' attends within windows of 5 x 5 patches.*stay dense.*self\.1, self\.3",
        ):
            bsa.uniform_plan(make(), "local_window", radius=2, layers=layers)

    def test_a_plan_that_names_a_windowed_layer(self):
        model = make()
        classes = [type(module) for module in model.modules()]
        plan = bsa.dense_plan(model).replace(layers=[0], pattern="local_window", radius=2)
        with pytest.raises(bsa.PlanError, match="attends within windows"):
            bsa.sparsify_(model, plan)
        assert [type(module) for module in model.modules()] == classes

    def test_a_plan_for_another_size(self):
        other = make(num_hidden_layers=6, global_attn_indexes=[2, 5])
        with pytest.raises(bsa.PlanError, match="depth: plan 6, model 4"):
            bsa.sparsify_(make(), bsa.dense_plan(other))


def test_tables_are_resized_as_segment_anything_does_it():
    """Against its formula, spelled out: half-pixel centres, linear, clamped at the ends."""
    table = torch.randn(9, 3, dtype=torch.float64).float()
    assert resize_table(table, 5) is table
    for side in (3, 8):
        length = 2 * side - 1
        got = resize_table(table, side)
        assert got.shape == (length, 3)
        for i in range(length):
            at = max((i + 0.5) * 9 / length - 0.5, 0.0)
            low = int(at)
            high = min(low + 1, 8)
            expected = table[low] * (1 - (at - low)) + table[high] * (at - low)
            torch.testing.assert_close(got[i], expected)

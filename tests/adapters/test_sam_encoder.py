"""SAM's image encoder in all implementations; the source of the table in docs/models.md."""

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
from bsa_vision.adapters.swap.sparse_layer import layers_of
from bsa_vision.attention.rel_pos import decompose, resize_table
from tests.helpers.errors import relative_error
from tests.helpers.sam_models import (
    ANY_SIZE,
    MODELS,
    attention_of,
    features,
    from_segment_anything,
    image,
    make,
)


def whole_sam():
    """Return a SAM with prompt encoder and mask decoder."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig

    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=96, patch_size=8)
    decoder = SamMaskDecoderConfig(
        hidden_size=16,
        mlp_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        iou_head_hidden_dim=16,
    )
    config = SamConfig(
        vision_config=make("transformers sam", num_pos_feats=8).config,
        prompt_encoder_config=prompts,
        mask_decoder_config=decoder,
    )
    return SamModel(config).eval()


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return make(name)


class TestExact:
    def test_terms_are_wide(self, name):
        """Check the test models: logits and relative terms have standard deviations above 1."""
        model, seen = make(name), []

        def record(attention, args, out):
            tokens = out.flatten(1, -2)  # (B, N, 3 * C)
            q, k, _ = tokens.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
            if "qk-norm" in name:
                q, k = attention.q_norm(q), attention.k_norm(k)
            seen.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).std())
            if attention.use_rel_pos:
                side = (len(attention.rel_pos_h) + 1) // 2
                rel = decompose(q, attention.rel_pos_h, attention.rel_pos_w, (side, side))
                seen.extend(term.std() for term in rel)

        for attention in attention_of(model):
            attention.qkv.register_forward_hook(
                lambda _, args, out, attention=attention: record(attention, args, out)
            )
        features(model, image())
        assert len(seen) == (4 if "rope" in name else 12)
        assert min(seen) > 1

    def test_dense_plan_changes_nothing(self, model):
        with torch.no_grad():
            expected = features(model, image())
            keys = list(model.state_dict())
            bsa.sparsify_(model, bsa.dense_plan(model))
            assert list(model.state_dict()) == keys
            assert relative_error(features(model, image()), expected) < 1e-5
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
            assert relative_error(features(model, image()), expected) < 1e-5

    @pytest.mark.parametrize("layer", ["windowed", "global"])
    def test_twin_without_the_relative_term(self, name, layer):
        model = make(name)
        with torch.no_grad():
            expected = features(model, image())
            bsa.sparsify_(model, bsa.dense_plan(model))
            attention = attention_of(model)[0 if layer == "windowed" else 1]
            attention.use_rel_pos = False
            attention.rope = None
            assert relative_error(features(model, image()), expected) > 1e-2

    def test_restore_is_bit_exact(self, model):
        classes = [type(module) for module in model.modules()]
        dicts = [set(module.__dict__) for module in model.modules()]
        with torch.no_grad():
            expected = features(model, image())
            bsa.restore_(bsa.sparsify_(model, bsa.dense_plan(model)))
            assert torch.equal(features(model, image()), expected)
        assert [type(module) for module in model.modules()] == classes
        assert [set(module.__dict__) for module in model.modules()] == dicts

    @pytest.mark.parametrize(
        "name",
        ["transformers sam", "segment_anything", "timm", "deepseek-ocr", "create_encoder"],
    )
    def test_without_relative_position(self, name):
        model = make(name, use_rel_pos=False)
        with torch.no_grad():
            expected = features(model, image())
            bsa.sparsify_(model, bsa.dense_plan(model))
            assert relative_error(features(model, image()), expected) < 1e-5

    @pytest.mark.parametrize("size", [(64, 64), (128, 128), (120, 56)])
    @pytest.mark.parametrize("name", sorted(ANY_SIZE))
    def test_other_resolutions(self, name, size):
        """Relative tables and positions are interpolated as in the original."""
        if name == "deepseek-ocr" and size[0] != size[1]:
            with pytest.raises(RuntimeError):
                features(make(name), image(*size))
            return
        model = make(name)
        with torch.no_grad():
            expected = features(model, image(*size))
            bsa.sparsify_(model, bsa.dense_plan(model))
            assert relative_error(features(model, image(*size)), expected) < 1e-5
            bsa.restore_(model)
            plan = bsa.uniform_plan(model, "local_window", radius=0, tile=(4, 4), block_size=16)
            sparse = features(bsa.sparsify_(model, plan), image(*size))
            bsa.restore_(model)
            masked = features(bsa.sparsify_(model, plan, backend="reference"), image(*size))
        assert relative_error(sparse, masked) < 1e-5
        assert relative_error(sparse, expected) > 1e-2

    @pytest.mark.parametrize("name", ["timm", "create_encoder"])
    def test_rectangular_construction(self, name):
        model = make(name, size=(64, 120))
        assert bsa.inspect(model).grid == (8, 15)
        with torch.no_grad():
            expected = features(model, image(64, 120))
            bsa.sparsify_(model, bsa.dense_plan(model))
            assert relative_error(features(model, image(64, 120)), expected) < 1e-5

    @pytest.mark.parametrize("name", sorted(set(MODELS) - ANY_SIZE))
    def test_a_size_the_model_cannot_take_is_its_own_error(self, name):
        errors = []
        for model in (make(name), bsa.sparsify_(make(name), bsa.dense_plan(make(name)))):
            with pytest.raises((ValueError, RuntimeError)) as info:
                features(model, image(64, 64))
            errors.append(f"{type(info.value).__name__}: {info.value}")
        if "rope" in name:  # the tokens are in another dimension
            errors = [error.replace("dimension 1", "dimension 2") for error in errors]
        assert errors[0] == errors[1]

    def test_nothing_is_tokens_by_tokens(self):
        """No operation of a swapped forward makes a B x H x N x N tensor; the original does."""
        model, largest = make(), []

        class Largest(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                largest.extend(
                    x.untyped_storage().nbytes()
                    for x in tree_leaves(out)
                    if isinstance(x, torch.Tensor)
                )
                return out

        matrix = 1 * 2 * 144 * 144 * 4
        with torch.no_grad(), Largest():
            features(model, image(batch=1))
            assert max(largest) >= matrix
            bsa.sparsify_(model, bsa.dense_plan(model))
            largest.clear()
            features(model, image(batch=1))
        assert max(largest) < matrix

    def test_gradients(self, name):
        """Compare one training step, including the gradients of relative tables."""
        model, twin = make(name).train(), make(name).train()
        bsa.sparsify_(twin, bsa.dense_plan(twin))
        for each in (model, twin):
            features(each, image()).square().mean().backward()
        largest = max(parameter.grad.norm() for parameter in model.parameters())
        for (key, a), b in zip(model.named_parameters(), twin.parameters()):
            if key.endswith("k_norm.bias"):  # equal for all keys of a query: rounding error only
                assert max(a.grad.norm(), b.grad.norm()) < 1e-6 * largest
                continue
            assert relative_error(b.grad, a.grad) < 1e-4, key
            if "rel_pos" in key:
                assert a.grad.norm() > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["dense", "sparse"])
    def test_compile_fullgraph(self, name, kind):
        """Compile the encoder as one graph; restored, the compiled model is dense again."""
        model = make(name)
        with torch.no_grad():
            original = features(model, image())
            plan = bsa.uniform_plan(model, "local_window", radius=2, order="raster", block_size=16)
            bsa.sparsify_(model, bsa.dense_plan(model) if kind == "dense" else plan)
            expected = features(model, image())
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert relative_error(features(compiled, image()), expected) < 1e-5
            assert (relative_error(expected, original) > 1e-2) == (kind == "sparse")
            bsa.restore_(model)
            assert relative_error(features(compiled, image()), original) < 1e-5


class TestSparse:
    def plan(self, model, **options):
        return bsa.uniform_plan(
            model, "local_window", radius=2, order="tile", tile=(4, 4), block_size=16, **options
        )

    def test_global_layers_only(self, model):
        spec = bsa.inspect(model)
        assert [layer.window for layer in spec.layers] == [5, 0, 5, 0]
        plan = self.plan(model)
        assert [set(names) == {"dense"} for names in plan.layers.values()] == [
            True,
            False,
            True,
            False,
        ]

    def test_equals_masked_arithmetic_and_differs_from_dense(self, model):
        with torch.no_grad():
            dense = features(model, image())
            plan = self.plan(model)
            outs = {}
            for backend in ("auto", "sdpa", "reference"):
                outs[backend] = features(bsa.sparsify_(model, plan, backend=backend), image())
                bsa.restore_(model)
        assert relative_error(outs["auto"], outs["sdpa"]) < 1e-5
        assert relative_error(outs["auto"], outs["reference"]) < 1e-5
        assert relative_error(outs["auto"], dense) > 1e-2

    def test_one_plan_and_one_checkpoint_for_every_code_base(self, name, tmp_path):
        """With segment_anything's weights and one plan file, all implementations agree."""
        source = make("segment_anything")
        self.plan(source).save(tmp_path / "plan.json")
        plan = bsa.SparsityPlan.load(tmp_path / "plan.json")
        model = make(name, seed=1)
        if "rope" in name or "qk-norm" in name:  # other weights, but the same plan
            assert bsa.sparsify_(model, plan) is model
            return
        missing, unexpected = model.load_state_dict(
            from_segment_anything(source.state_dict(), name), strict=False
        )
        assert not unexpected
        # DeepSeek-OCR's layers after the encoder.
        assert {key.partition(".")[0] for key in missing} <= {"net_2", "net_3", "proj"}
        outs, neck = [], getattr(model, "vision_encoder", model).neck
        neck.register_forward_hook(lambda module, args, out: outs.append(out))
        with torch.no_grad():
            expected = [source(image()), bsa.sparsify_(source, plan)(image())]
            features(model, image())
            features(bsa.sparsify_(model, plan), image())
        assert relative_error(outs[0], expected[0]) < 1e-5
        assert relative_error(outs[1], expected[1]) < 1e-5
        assert relative_error(outs[1], expected[0]) > 1e-2

    def test_copies_and_pickles(self, model):
        with torch.no_grad():
            bsa.sparsify_(model, self.plan(model))
            expected = features(model, image())
            saved = io.BytesIO()
            torch.save(model, saved)
            saved.seek(0)
            copies = [
                copy.deepcopy(model),
                pickle.loads(pickle.dumps(model)),
                torch.load(saved, weights_only=False),
            ]
            for other in copies:
                assert torch.equal(features(other, image()), expected)
            originals = {type(module).__name__ for module in bsa.restore_(copies[1]).modules()}
            assert not any(name.startswith("Sparse") for name in originals)
            assert torch.equal(features(model, image()), expected)

    def test_a_whole_sam_has_its_decoder_left_alone(self):
        model = whole_sam()
        decoder_classes = [type(module) for module in model.mask_decoder.modules()]
        points = torch.tensor([[[[40.0, 50.0]]]])
        with torch.no_grad():
            expected = model(pixel_values=image(batch=1), input_points=points).pred_masks
            bsa.sparsify_(model, bsa.dense_plan(model))
            got = model(pixel_values=image(batch=1), input_points=points).pred_masks
        assert relative_error(got, expected) < 1e-4
        assert [type(module) for module in model.mask_decoder.modules()] == decoder_classes

    def test_describe(self):
        model = make()
        report = bsa.describe(bsa.sparsify_(model, self.plan(model)))
        assert [layer.tokens for layer in report.layers] == [25, 144, 25, 144]
        assert [bool(layer.sparsity) for layer in report.layers] == [False, True, False, True]
        assert {layer.backend for layer in report.layers} == {"gather"}

    def test_describe_says_what_sparsity_can_gain_and_what_stays_dense(self):
        model = whole_sam()
        report = bsa.describe(bsa.sparsify_(model, self.plan(model)))
        text = str(report)
        assert "sparsity in the global layers can gain at most" in text
        assert f"this plan gains at most {report.gain:.2f}x" in text
        assert 1 < report.gain < report.cost.ceiling()
        assert report.layers[1].share == report.cost.share(["self.1"]) > 0
        (left,) = report.left
        assert (left.where, left.kind, left.count) == (
            "mask_decoder.transformer",
            "SamAttention",
            4,
        )
        assert "about 7 tokens, less than one block" in left.reason
        assert str(left) in text

    def test_describe_says_why_deepseeks_clip_tower_stays_dense(self):
        from tests.helpers.deepencoder import NoTPAttention

        model = nn.ModuleDict(
            {"sam_model": make("deepseek-ocr"), "vision_model": nn.Sequential(NoTPAttention())}
        )
        (left,) = bsa.describe(bsa.sparsify_(model, bsa.dense_plan(model))).left
        assert str(left) == (
            "left dense: vision_model.0, 1 x NoTPAttention: DeepSeek-OCR's CLIP tower has at most "
            "401 tokens: too few for sparsity to pay off"
        )
        unknown = nn.ModuleDict(
            {"sam_model": make("deepseek-ocr"), "text": nn.MultiheadAttention(8, 2)}
        )
        (left,) = bsa.describe(bsa.sparsify_(unknown, bsa.dense_plan(unknown))).left
        assert (left.kind, left.reason) == ("MultiheadAttention", "unsupported attention class")

    def test_segment_anythings_decoder_stays_dense(self):
        from segment_anything.build_sam import _build_sam

        with torch.device("meta"):
            model = _build_sam(32, 4, 2, [1, 3])
        model.image_encoder = make("segment_anything")
        (left,) = bsa.describe(bsa.sparsify_(model, bsa.dense_plan(model))).left
        assert (left.where, left.kind, left.count) == ("mask_decoder.transformer", "Attention", 7)
        assert "about 7 tokens" in left.reason

    def test_describe_labels_windows(self):
        model = make()
        for tile, label in (
            ((4, 4), "is exact: every block lies in one window"),
            ((2, 8), "is a cover (any-rule)"),
        ):
            plan = bsa.uniform_plan(model, "window", size=4, tile=tile, block_size=16)
            assert f"window(size=4) {label}" in str(bsa.describe(bsa.sparsify_(model, plan)))
            bsa.restore_(model)


class TestOutsideTheContract:
    def test_attention_weights(self):
        model = make("transformers sam, eager")
        with torch.no_grad():
            expected = model(image(), output_attentions=True).attentions
            bsa.sparsify_(model, bsa.dense_plan(model))
            with pytest.warns(UserWarning, match="attention weights were requested"):
                got = model(image(), output_attentions=True).attentions
            assert len(got) == len(expected) == 4
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
            assert bsa.describe(model).layers[0].fallbacks == {
                "attention weights were requested": 1
            }
            bsa.restore_(model)
            bsa.sparsify_(model, bsa.dense_plan(model), on_unsupported="error")
            with pytest.raises(bsa.BackendUnavailable, match="attention weights were requested"):
                model(image(), output_attentions=True)

    @pytest.mark.slow
    def test_attention_weights_of_a_compiled_model(self):
        model = make("transformers sam, eager")
        bsa.sparsify_(model, bsa.dense_plan(model))
        with torch.no_grad():
            torch.compiler.reset()
            out = torch.compile(model, backend="aot_eager")(image(), output_attentions=True)
        assert len(out.attentions) == 4

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_dropout_of_weights_as_the_class_does_it(self, attention):
        """In training, the eager class has dropout on attention weights, the SDPA class has not."""
        model = make("transformers sam", attention=attention, attention_dropout=0.5).train()
        bsa.sparsify_(model, bsa.dense_plan(model))
        with torch.no_grad():
            assert torch.equal(features(model, image()), features(model, image())) == (
                attention == "sdpa"
            )


class TestWrappedProjections:
    """Projections wrapped as LoRA does it, before and after the swap, or quantized."""

    class Wrapped(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 96, bias=False)

        def forward(self, x):
            return self.linear(x) + self.up(self.down(x))

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_lora(self, when):
        model, twin = make("segment_anything"), make("segment_anything")
        if when == "after":
            bsa.sparsify_(model, bsa.dense_plan(model))
        for each in (model, twin):
            for attention in attention_of(each):
                torch.manual_seed(0)
                attention.qkv = self.Wrapped(attention.qkv)
        if when == "before":
            bsa.sparsify_(model, bsa.dense_plan(model))
            wrapped, plain = bsa.cost(bsa.inspect(model)), bsa.cost(bsa.inspect(make()))
            assert wrapped.layers[0].linear > plain.layers[0].linear
        with torch.no_grad():
            assert relative_error(features(model, image()), features(twin, image())) < 1e-5

    def test_quantized(self):
        model = torch.ao.quantization.quantize_dynamic(
            make("segment_anything", use_rel_pos=False), {nn.Linear}
        )
        with torch.no_grad():
            expected = features(model, image())
            bsa.sparsify_(model, bsa.dense_plan(model))
            # Dynamic quantization amplifies rounding differences of the activations.
            assert relative_error(features(model, image()), expected) < 1e-2
        plain = bsa.inspect(make("segment_anything", use_rel_pos=False))
        assert bsa.describe(model).cost.flops == bsa.cost(plain).flops


class TestErrors:
    def test_a_class_that_something_else_changed_since(self):
        """Parametrizations change classes as well; `restore_` must not undo them silently."""
        model = make()
        bsa.sparsify_(model, bsa.dense_plan(model))
        attention = next(module for module in model.modules() if hasattr(module, "rel_pos_h"))
        nn.utils.parametrize.register_parametrization(attention, "rel_pos_h", nn.Identity())
        classes = [type(module) for module in model.modules()]
        with pytest.raises(
            ValueError, match=r"became a Parametrized.* since sparsify_.*remove it first"
        ):
            bsa.restore_(model)
        assert [type(module) for module in model.modules()] == classes
        nn.utils.parametrize.remove_parametrizations(attention, "rel_pos_h")
        bsa.restore_(model)
        assert not layers_of(model)

    def test_a_forward_set_on_the_module(self):
        """A forward set on the module, as accelerate's hooks do, would hide the swapped class."""
        model = make("segment_anything")
        attention = attention_of(model)[3]
        attention.forward = lambda x, forward=attention.forward: forward(x)
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(
            ValueError,
            match=r"blocks\.3\.attn has its forward replaced.*call sparsify_ before wrapping",
        ):
            bsa.sparsify_(model, bsa.dense_plan(model))
        assert [type(module) for module in model.modules()] == kinds
        del attention.forward
        bsa.sparsify_(model, bsa.dense_plan(model))

    @pytest.mark.parametrize("name", ["segment_anything", "create_encoder"])
    def test_an_encoder_of_which_a_part_is_wrapped(self, name):
        model = make(name)
        model.blocks[1].attn = nn.Sequential(model.blocks[1].attn)
        with pytest.raises(
            bsa.PlanError,
            match=r"attention of blocks 1 of 'blocks' has another class, or is wrapped",
        ):
            bsa.inspect(model)

    def test_two_encoders_are_described_one_at_a_time(self):
        model = nn.ModuleDict({"a": make("segment_anything"), "b": make("create_encoder")})
        for encoder in model.values():
            bsa.sparsify_(encoder, bsa.dense_plan(encoder))
        with pytest.raises(
            ValueError, match="several encoders with sparse heads: pass one of them"
        ):
            bsa.describe(model)

    @pytest.mark.parametrize("layers", [0, ["self.2"], [0, 1]])
    def test_a_windowed_layer_asked_for(self, layers):
        message = (
            r"layer 'self\.[02]' attends within windows of 5 x 5 patches.*stay dense.*"
            r"self\.1, self\.3"
        )
        with pytest.raises(bsa.PlanError, match=message):
            bsa.uniform_plan(make(), "local_window", radius=2, layers=layers)

    def test_a_plan_that_names_a_windowed_layer(self):
        model = make()
        classes = [type(module) for module in model.modules()]
        plan = bsa.dense_plan(model).replace(layers=[0], pattern="local_window", radius=2)
        with pytest.raises(bsa.PlanError, match="attends within windows"):
            bsa.sparsify_(model, plan)
        assert [type(module) for module in model.modules()] == classes

    def test_a_plan_for_another_size(self):
        other = make(depth=6)
        with pytest.raises(bsa.PlanError, match="depth: plan 6, model 4"):
            bsa.sparsify_(make(), bsa.dense_plan(other))


def test_tables_are_resized_as_segment_anything_does_it():
    """Compare with the formula: half-pixel centres, linear, clamped at the ends."""
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

"""transformers models with small configs and redrawn weights: exact, sparse, reversible."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

import bsa_vision as bsa
from bsa_vision.adapters.swap.sparse_layer import layers_of
from bsa_vision.masks import TokenLayout, generate_vit_hybrid_mask, local_window
from tests.helpers.errors import relative_error
from tests.helpers.models import MODELS, SMALL, START, attention_logits, features, image, make

BLOCK = dict(block_size=8, tile=(2, 4))
FAMILIES = pytest.mark.parametrize("name", MODELS)


def sparse_plan(model, **options):
    return bsa.uniform_plan(model, "local_window", radius=1, dense_heads=1, **{**BLOCK, **options})


def masked_attention(plan, spec, grid):
    """Return an attention function that applies the plan's masks token by token to dense logits."""
    counter = iter(range(10**6))

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        layout = plan.layout(spec, grid)
        names = plan.layers[f"self.{next(counter) % len(spec.layers)}"]
        block = torch.arange(layout.num_tokens)[layout.inverse] // layout.block_size
        masks = [
            torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool)
            if name == "dense"
            else plan.patterns[name](layout)
            for name in names
        ]
        keep = torch.stack(masks)[:, block][:, :, block]
        logits = (query @ key.transpose(-1, -2) * scaling).masked_fill(~keep, -torch.inf)
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    return attend


def run_with(model, attend, pixels):
    from transformers import AttentionInterface

    AttentionInterface.register("test_attention", attend)
    other = copy.deepcopy(model)
    other.set_attn_implementation("test_attention")
    with torch.no_grad():
        return features(other, pixels)


@FAMILIES
class TestEveryFamily:
    def test_logits_are_wide(self, name):
        for logits in attention_logits(make(name), image()):
            assert logits.std() >= 1

    def test_inspect(self, name):
        spec = bsa.inspect(make(name))
        assert spec.family == name.removesuffix("_with_registers")
        assert (spec.grid, spec.patch_size, spec.num_prefix_tokens, spec.num_suffix_tokens) == (
            (8, 8),
            (8, 8),
            START[name],
            0,
        )
        assert [(layer.index, layer.heads, layer.head_dim) for layer in spec.layers] == [
            (i, 4, 12) for i in range(3)
        ]
        assert bsa.inspect(make(name), image_size=(64, 96)).grid == (8, 12)

    @pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "gather"])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_dense_plan_is_exact(self, name, backend, implementation):
        model = make(name, attn_implementation=implementation)
        pixels = image(72, 40)
        expected, keys = features(model, pixels), list(model.state_dict())
        parameters = [id(p) for p in model.parameters()]
        assert bsa.sparsify_(model, bsa.dense_plan(model), backend=backend) is model
        assert relative_error(features(model, pixels), expected) <= 1e-5
        assert list(model.state_dict()) == keys
        assert [id(p) for p in model.parameters()] == parameters
        bsa.restore_(model)
        assert torch.equal(features(model, pixels), expected)

    @pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "gather"])
    @pytest.mark.parametrize("order", ["raster", "tile"])
    def test_sparse_plan_equals_masked_arithmetic(self, name, backend, order):
        model, pixels = make(name), image(72, 40)
        plan = sparse_plan(model, order=order)
        expected = run_with(model, masked_attention(plan, bsa.inspect(model), (9, 5)), pixels)
        dense = features(model, pixels)
        bsa.sparsify_(model, plan, backend=backend)
        out = features(model, pixels)
        assert relative_error(out, expected) <= 1e-5
        # The counter-check: no masks, or masks of the wrong grid, are far outside that tolerance.
        assert relative_error(dense, expected) > 1e-2
        wrong = run_with(
            bsa.restore_(model), masked_attention(plan, bsa.inspect(model), (5, 9)), pixels
        )
        assert relative_error(wrong, expected) > 1e-3

    def test_restore_is_bit_exact_and_leaves_nothing(self, name):
        model, pixels = make(name), image()
        before = {module: dict(module.__dict__) for module in model.modules()}
        config = model.config.to_dict()
        expected = features(model, pixels)
        bsa.sparsify_(model, sparse_plan(model))
        assert not torch.equal(features(model, pixels), expected)
        bsa.restore_(model)
        assert torch.equal(features(model, pixels), expected)
        for module, attributes in before.items():
            assert module.__dict__ == attributes
        assert model.config.to_dict() == config

    def test_copies_are_independent_and_stay_sparse(self, name):
        model, pixels = make(name), image()
        original = features(model, pixels)
        bsa.sparsify_(model, sparse_plan(model))
        expected = features(model, pixels)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ]
        bsa.restore_(model)
        for other in copies:
            assert torch.equal(features(other, pixels), expected)
            bsa.restore_(other)
            assert torch.equal(features(other, pixels), original)
        assert torch.equal(features(model, pixels), original)

    def test_gradients_equal_the_originals(self, name):
        model, pixels = make(name), image(40, 56)

        def gradients():
            model.zero_grad()
            out = features(model, pixels)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
            (out * weights).sum().backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        expected = gradients()
        bsa.sparsify_(model, bsa.dense_plan(model), backend="gather")
        got = gradients()
        assert got.keys() == expected.keys()
        largest = max(grad.abs().max() for grad in expected.values())
        for n, grad in got.items():
            # A key bias shifts all logits of a row alike: its gradient is rounding error.
            scale = largest if "k_proj.bias" in n else expected[n].abs().max()
            assert (grad - expected[n]).abs().max() <= 1e-4 * scale, n
            assert scale > 0

    @pytest.mark.slow
    def test_compile_fullgraph(self, name):
        model, pixels = make(name), image()
        bsa.sparsify_(model, sparse_plan(model))
        expected = features(model, pixels)
        # SigLIP 2's grids are values of a tensor, on which a full graph cannot depend.
        compiled = torch.compile(model, fullgraph=name != "siglip2", backend="aot_eager")
        with_mask = ("vit", "dinov2", "dinov2_with_registers", "siglip2")
        if torch.__version__ < (2, 13) and name in with_mask:
            # `torch.compiler.is_exporting()` is True while torch.compile traces, so transformers
            # passes a mask.
            loud = (
                pytest.warns(UserWarning, match="an attention mask was passed")
                if name == "siglip2"
                else pytest.raises(Exception, match=r"before torch 2\.13|Observed exception")
            )
            with loud:
                features(compiled, pixels)
            return
        assert relative_error(features(compiled, pixels), expected) <= 1e-6

    def test_dense_context(self, name):
        model, pixels = make(name), image()
        expected = features(model, pixels)
        bsa.sparsify_(model, sparse_plan(model))
        sparse = features(model, pixels)
        with bsa.dense(model) as same:
            assert same is model
            assert torch.equal(features(model, pixels), expected)
        assert torch.equal(features(model, pixels), sparse)


@pytest.mark.parametrize("name", ["vit", "dinov2"])  # they pass attention_mask to every layer
def test_padding_masks_reach_the_original(name):
    """Unsupported calls run the original; they are counted, and warned of once."""
    model, pixels = make(name), image()
    mask = torch.ones(1, 65, dtype=torch.long)
    mask[:, 50:] = 0
    expected = features(model, pixels, attention_mask=mask)
    assert relative_error(features(model, pixels), expected) > 1e-2
    bsa.sparsify_(model, sparse_plan(model))
    with pytest.warns(
        UserWarning, match="runs its original, dense attention: an attention mask was passed"
    ):
        out = features(model, pixels, attention_mask=mask)
    assert torch.equal(out, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features(model, pixels, attention_mask=mask)
    assert bsa.describe(model).layers[0].fallbacks == {"an attention mask was passed": 2}


@FAMILIES
@pytest.mark.parametrize("dense_heads", [0, 2, 4])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_autocast(name, dense_heads, backend):
    """With rotary embeddings, q and k stay float32 while v is bfloat16."""
    model, pixels = make(name), image()
    plan = sparse_plan(model)
    if dense_heads:
        plan = plan.replace(heads=range(dense_heads), pattern="dense")
    bsa.sparsify_(model, plan, backend)
    expected = features(model, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        out = features(model, pixels)
    assert (out - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_images_of_two_sizes(reentrant):
    model = make("dinov3").train()
    model.rope_embeddings.eval()  # in training, it shifts coordinates at random
    bsa.sparsify_(model, sparse_plan(model))

    def gradient(*sizes):
        model.zero_grad()
        sum(
            features(model, image(*size).requires_grad_()).pow(3).sum() for size in sizes
        ).backward()
        return model.get_parameter("model.layer.0.attention.q_proj.weight").grad.clone()

    expected = gradient((64, 64), (40, 56))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    assert relative_error(gradient((64, 64), (40, 56)), expected) < 1e-5
    for turned in ((64, 32), (32, 64)):  # one backward for each: the grids are known
        assert gradient(turned).isfinite().all()
    # One backward for two grids with the same number of tokens: an error.
    with pytest.raises(
        RuntimeError, match=r"inputs of grids \[\(4, 8\), \(8, 4\)\] match.*run backward before"
    ):
        gradient((64, 32), (32, 64))


def test_export_is_refused_where_it_would_be_dense():
    model, pixels = make("dinov2"), image()
    bsa.sparsify_(model, sparse_plan(model))
    with pytest.raises(Exception, match=r"torch.export would export layer .* dense"):
        torch.export.export(model, (pixels,))
    model = make("dinov3")
    bsa.sparsify_(model, sparse_plan(model))
    exported = torch.export.export(model, (pixels,)).module()
    assert torch.equal(exported(pixels).last_hidden_state, features(model, pixels))


def test_a_copy_made_inside_dense_is_sparse():
    model, pixels = make("vit"), image()
    bsa.sparsify_(model, sparse_plan(model))
    expected = features(model, pixels)
    with bsa.dense(model):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in copies:
        assert torch.equal(features(other, pixels), expected)


def test_an_encoder_is_restored_as_a_whole():
    model = make("dinov3")
    bsa.sparsify_(model, sparse_plan(model))
    with pytest.raises(
        ValueError, match=r"holds 1 of 3 swapped layers.*pass the model that sparsify_ was given"
    ):
        bsa.restore_(model.get_submodule("model.layer.0.attention"))
    assert len(layers_of(bsa.restore_(model))) == 0


def test_tracing_leaves_the_model_as_it_was():
    model, pixels = make("dinov3"), image()
    bsa.sparsify_(model, sparse_plan(model))

    class LastHiddenState(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).last_hidden_state

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(LastHiddenState(), pixels, check_trace=False)
    assert torch.equal(traced(pixels), features(model, pixels))
    assert bsa.describe(model).grid == (8, 8)


def test_layers_a_plan_does_not_name_are_dense_and_counted():
    model = make("vit")
    whole = sparse_plan(model)
    plan = bsa.SparsityPlan(
        whole.model, whole.patterns, {"self.1": whole.layers["self.1"]}, whole.order, whole.tile, 8
    )
    bsa.sparsify_(model, plan)
    report = bsa.describe(model)
    assert [layer.backend for layer in report.layers] == ["original", "gather", "original"]
    assert report.sparsity == pytest.approx(plan.sparsity(plan.layout(bsa.inspect(model))))


def test_attention_weights_come_from_the_original():
    model, pixels = make("vit", attn_implementation="eager"), image()
    expected = model(pixels, output_attentions=True).attentions
    bsa.sparsify_(model, sparse_plan(model))
    with pytest.warns(UserWarning, match="attention weights were requested"):
        weights = model(pixels, output_attentions=True).attentions
    assert len(weights) == len(expected) == 3
    for a, b in zip(weights, expected):
        assert torch.equal(a, b)


def test_on_unsupported_error():
    model = bsa.sparsify_(make("vit"), sparse_plan(make("vit")), on_unsupported="error")
    with pytest.raises(
        bsa.BackendUnavailable,
        match=r"layers.0.attention.*an attention mask was passed.*on_unsupported",
    ):
        features(model, image(), attention_mask=torch.zeros(1, 65, dtype=torch.long))


def test_a_model_with_a_head():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=96, num_labels=3)).eval()
    expected = model(image()).logits
    assert bsa.inspect(model).layers[0].name == "vit.layers.0.attention"
    bsa.sparsify_(model, bsa.dense_plan(model), backend="gather")
    assert relative_error(model(image()).logits, expected) <= 1e-5


def test_training_and_eval_run_the_same_heads():
    model, pixels = make("vit"), image()
    bsa.sparsify_(model, sparse_plan(model))
    assert torch.equal(features(model.train(), pixels), features(model.eval(), pixels))


def test_hooks_survive():
    model = make("vit")
    called = []
    model.layers[1].attention.register_forward_hook(lambda *_: called.append(1))
    bsa.sparsify_(model, sparse_plan(model))
    features(model, image())
    bsa.restore_(model)
    features(model, image())
    assert called == [1, 1]


def test_two_models_with_one_config_object():
    """Two models of transformers share one config; swapping one must not change the other."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**SMALL, intermediate_size=96)
    first, second = ViTModel(config).eval(), ViTModel(config).eval()
    expected = features(second, image())
    bsa.sparsify_(first, sparse_plan(first))
    features(first, image())
    assert torch.equal(features(second, image()), expected)
    assert not layers_of(second)


def test_named_by_the_user_without_a_plan():
    """attn_implementation="bsa_vision" without a plan is dense, with padding masks."""
    from bsa_vision.adapters.swap import config_swap

    config_swap.prepare()
    model, other = make("vit"), make("vit", attn_implementation="bsa_vision")
    mask = torch.ones(1, 65, dtype=torch.long)
    mask[:, 50:] = 0
    assert torch.equal(features(other, image()), features(model, image()))
    assert torch.equal(
        features(other, image(), attention_mask=mask), features(model, image(), attention_mask=mask)
    )


def test_only_some_layers():
    model, pixels = make("vit"), image()
    bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", radius=1, layers=[2], **BLOCK))
    hidden = model(pixels, output_hidden_states=True).hidden_states
    with bsa.dense(model):
        expected = model(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[2], expected[2])
    assert not torch.equal(hidden[3], expected[3])
    assert [layer.backend for layer in bsa.describe(model).layers] == [
        "original",
        "original",
        "gather",
    ]


def test_generator_output_into_a_model():
    model, pixels = make("vit"), image()
    hm = bsa.HeadMasks(
        *generate_vit_hybrid_mask(64, 8, 8, 2, 4, num_global_heads=1, sparsity=0.7), block_size=8
    )
    plan = bsa.SparsityPlan.from_head_masks(bsa.inspect(model), {"layers.1.attention": hm})
    assert plan.order == "raster"
    dense = features(model, pixels)
    bsa.sparsify_(model, plan)
    out = features(model, pixels)
    assert relative_error(out, dense) > 1e-2
    report = bsa.describe(model)
    assert report.layers[1].head_sparsity == pytest.approx(hm.head_sparsity)
    assert report.layers[0].sparsity == 0


def test_a_users_own_pattern():
    def mine(layout: TokenLayout) -> torch.Tensor:
        return local_window(layout, 1) | (torch.arange(layout.num_blocks) % 3 == 0)

    model = make("dinov3")
    plan = bsa.dense_plan(model).replace(layers=[0], heads=[3], pattern=mine)
    bsa.sparsify_(model, plan)
    features(model, image())
    assert bsa.describe(model).layers[0].patterns == ("dense", "dense", "dense", "mine")


def test_describe_as_a_table():
    model = make("dinov3")
    bsa.sparsify_(model, sparse_plan(model))
    text = str(bsa.describe(model))
    assert "dinov3, 8 x 8 patches, order tile" in text
    assert "1 x dense, 3 x local_window(radius=1)" in text
    assert "not kernel: the kernel runs on CUDA, the tensors are on cpu" in text


def test_a_pickled_model_runs_in_a_fresh_process(tmp_path):
    model, pixels = make("vit"), image()
    bsa.sparsify_(model, sparse_plan(model))
    expected = features(model, pixels)
    torch.save({"model": model, "pixels": pixels, "expected": expected}, tmp_path / "model.pt")
    code = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(saved['model'](saved['pixels']).last_hidden_state, saved['expected'])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)

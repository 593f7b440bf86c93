"""Real transformers classes at small configs, weights redrawn: exact with a dense plan, masked with a sparse one, reversible."""

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
from tests.helpers import timm_models
from tests.helpers.models import MODELS, SMALL, START, attention_logits, features, image, make

BLOCK = dict(block_size=8, tile=(2, 4))
FAMILIES = pytest.mark.parametrize("name", MODELS)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def sparse_plan(model, **options):
    return bsa.uniform_plan(model, "local_window", radius=1, dense_heads=1, **{**BLOCK, **options})


def masked_attention(plan, spec, grid):
    """An attention function that applies the plan's masks densely, token by token, with arithmetic of its own."""
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
        assert relative(features(model, pixels), expected) <= 1e-5
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
        assert relative(out, expected) <= 1e-5
        # The twin: leaving the masks out, or laying them on the wrong grid, is far outside that tolerance.
        assert relative(dense, expected) > 1e-2
        wrong = run_with(
            bsa.restore_(model), masked_attention(plan, bsa.inspect(model), (5, 9)), pixels
        )
        assert relative(wrong, expected) > 1e-3

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
            (
                out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
            ).sum().backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        expected = gradients()
        bsa.sparsify_(model, bsa.dense_plan(model), backend="gather")
        got = gradients()
        assert got.keys() == expected.keys()
        largest = max(grad.abs().max() for grad in expected.values())
        for (
            n,
            grad,
        ) in (
            got.items()
        ):  # a key bias shifts every logit of a row alike: its gradient is rounding only
            scale = largest if "k_proj.bias" in n else expected[n].abs().max()
            assert (grad - expected[n]).abs().max() <= 1e-4 * scale, n
            assert scale > 0

    def test_compile_fullgraph(self, name):
        model, pixels = make(name), image()
        bsa.sparsify_(model, sparse_plan(model))
        expected = features(model, pixels)
        # SigLIP 2's grids are values of a tensor: a graph cannot hold what follows from them.
        compiled = torch.compile(model, fullgraph=name != "siglip2", backend="aot_eager")
        if torch.__version__ < (2, 13) and name in (
            "vit",
            "dinov2",
            "dinov2_with_registers",
            "siglip2",
        ):
            # `torch.compiler.is_exporting()` is True there while torch.compile traces; transformers then passes a mask.
            loud = pytest.warns(UserWarning, match="an attention mask was passed") if name == "siglip2" else pytest.raises(Exception, match=r"before torch 2\.13|Observed exception")  # fmt: skip
            with loud:
                features(compiled, pixels)
            return
        assert relative(features(compiled, pixels), expected) <= 1e-6

    def test_dense_context(self, name):
        model, pixels = make(name), image()
        expected = features(model, pixels)
        bsa.sparsify_(model, sparse_plan(model))
        sparse = features(model, pixels)
        with bsa.dense(model) as same:
            assert same is model
            assert torch.equal(features(model, pixels), expected)
        assert torch.equal(features(model, pixels), sparse)


@pytest.mark.parametrize(
    "name", ["vit", "dinov2"]
)  # the ones whose forward hands an attention_mask to every layer
def test_padding_masks_reach_the_original(name):
    """Outside the contract the original runs: counted, warned of once, and never a different result."""
    model, pixels = make(name), image()
    mask = torch.ones(1, 65, dtype=torch.long)
    mask[:, 50:] = 0
    expected = features(model, pixels, attention_mask=mask)
    assert relative(features(model, pixels), expected) > 1e-2
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
    """Rotary embeddings leave q and k in float32 while v is bfloat16."""
    model, pixels = make(name), image()
    bsa.sparsify_(
        model,
        sparse_plan(model).replace(heads=range(dense_heads), pattern="dense")
        if dense_heads
        else sparse_plan(model),
        backend,
    )
    expected = features(model, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        out = features(model, pixels)
    assert (out - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_images_of_two_sizes(reentrant):
    model = make("dinov3").train()
    model.rope_embeddings.eval()  # which moves coordinates at random in training
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
    assert relative(gradient((64, 64), (40, 56)), expected) < 1e-5
    for turned in ((64, 32), (32, 64)):  # one after the other is told apart ...
        assert gradient(turned).isfinite().all()
    # ... two with equally many tokens before one backward are not, and that is said
    with pytest.raises(
        RuntimeError, match=r"images of \[\(4, 8\), \(8, 4\)\] patches came by.*run backward before"
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
    with pytest.warns(UserWarning, match="attention weights were asked for"):
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


def test_unknown_grid_runs_the_original():
    """An encoder that is called without its embeddings has no image to take the grid from."""
    model = make("dinov2")
    hidden = torch.randn(1, 30, 48)
    expected = model.encoder(hidden).last_hidden_state
    bsa.sparsify_(model, sparse_plan(model))
    with pytest.warns(UserWarning, match="the grid of this input cannot be told"):
        assert torch.equal(model.encoder(hidden).last_hidden_state, expected)


def test_grid_follows_the_input():
    model = make("dinov3")
    bsa.sparsify_(model, sparse_plan(model))
    for size in ((64, 32), (32, 64), (40, 72)):
        features(model, image(*size))
        report = bsa.describe(model)
        assert report.grid == (size[0] // 8, size[1] // 8)
        assert report.layers[0].tokens == 5 + report.grid[0] * report.grid[1]
    assert bsa.describe(model, image_size=128).grid == (16, 16)


def test_a_heads_model_is_served_too():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=96, num_labels=3)).eval()
    expected = model(image()).logits
    assert bsa.inspect(model).layers[0].name == "vit.layers.0.attention"
    bsa.sparsify_(model, bsa.dense_plan(model), backend="gather")
    assert relative(model(image()).logits, expected) <= 1e-5


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
    """transformers models share the config they were made from; swapping one must not touch the other."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**SMALL, intermediate_size=96)
    first, second = ViTModel(config).eval(), ViTModel(config).eval()
    expected = features(second, image())
    bsa.sparsify_(first, sparse_plan(first))
    features(first, image())
    assert torch.equal(features(second, image()), expected)
    assert not layers_of(second)


def test_named_by_the_user_without_a_plan():
    """from_pretrained(..., attn_implementation="bsa_vision") with no plan is dense, padding masks included."""
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
    assert relative(out, dense) > 1e-2
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
                FileNotFoundError, match=r"no such file; pass a SparsityPlan or the path of one"
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
        with pytest.raises(ValueError, match=r"sparse heads already.*restore_"):
            bsa.sparsify_(model, sparse_plan(model))

    def test_a_model_without_sparse_heads_is_described_as_it_is(self):
        model = make("vit")
        before = [dict(module.__dict__) for module in model.modules()]
        report = bsa.describe(model)
        assert [layer.backend for layer in report.layers] == ["original"] * 3
        assert (report.sparsity, report.gain) == (0, 1)
        assert report.cost.ceiling() > 1
        assert report.left == ()  # what is described is not left out
        assert [dict(module.__dict__) for module in model.modules()] == before

    def test_unsupported_models(self):
        with pytest.raises(bsa.PlanError, match=r"of Linear.*it has none.*transformers ViT"):
            bsa.inspect(torch.nn.Linear(2, 2))
        with pytest.raises(bsa.PlanError, match="it has 1 x MultiheadAttention"):
            bsa.inspect(torch.nn.TransformerEncoderLayer(8, 2))
        with pytest.raises(TypeError, match=r"model is a str: expected a torch.nn.Module"):
            bsa.inspect("dinov3")
        with pytest.raises(
            bsa.PlanError,
            match=r"holds 2 encoders: vit \(0.layers\), dinov3 .*pass the module you mean",
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
            match=r"image_size=100: both sides must be whole numbers of \(8, 8\) pixel patches",
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


class TestTokensOfAnotherImage:
    """As many tokens, another grid: whose they are is known from the patch embedding, or not at all."""

    def made(self, model, pixels):
        """Tokens as the first layer gets them, and nothing but the embedding run."""
        from timm.models import VisionTransformer

        assert isinstance(model, VisionTransformer)
        return model.norm_pre(model._pos_embed(model.patch_embed(pixels)))

    def blocks(self, model, tokens):
        return model.blocks(tokens)

    @pytest.fixture
    def model(self):
        return timm_models.make("vit, any size")

    def images(self):
        return timm_models.image(96, 64, batch=1), timm_models.image(64, 96, batch=1)

    def sparse(self, model, **options):
        return bsa.sparsify_(
            model, bsa.uniform_plan(model, "local_window", radius=1, **BLOCK), **options
        )

    @torch.no_grad()
    @pytest.mark.parametrize("on_unsupported", ["error", "fallback"])
    def test_made_one_after_the_other(self, model, on_unsupported):
        """Which of two images is meant cannot be told; the original runs, or nothing."""
        tall, wide = self.images()
        dense = self.blocks(model, self.made(model, tall))
        self.sparse(model, on_unsupported=on_unsupported)
        tokens, _ = self.made(model, tall), self.made(model, wide)
        message = r"patches of images of \[\(8, 12\), \(12, 8\)\] were made, and these 97 tokens may be of any"
        if on_unsupported == "error":
            with pytest.raises(bsa.BackendUnavailable, match=message):
                self.blocks(model, tokens)
        else:
            with pytest.warns(UserWarning, match=message):
                assert torch.equal(self.blocks(model, tokens), dense)
        for pixels in (tall, wide, tall):  # and afterwards all is as before
            model(pixels)
        assert layers_of(model)[0].fallbacks.total() == (on_unsupported == "fallback")

    @torch.no_grad()
    def test_of_other_sizes_are_told_apart(self, model):
        tall, small = self.images()[0], timm_models.image(64, 64, batch=1)
        self.sparse(model, on_unsupported="error")
        expected = [self.blocks(model, self.made(model, pixels)) for pixels in (tall, small)]
        tokens = [self.made(model, pixels) for pixels in (tall, small)]
        for own, wanted in zip(tokens, expected, strict=True):
            assert torch.equal(self.blocks(model, own), wanted)

    @torch.no_grad()
    def test_that_came_without_their_image(self, model):
        tall, wide = self.images()
        tokens = self.made(model, wide)
        self.sparse(model, on_unsupported="error")
        model(tall)
        for _ in range(2):
            with pytest.raises(
                bsa.BackendUnavailable,
                match=r"got 97 tokens that did not come through the patch embedding.*\(12, 8\)",
            ):
                self.blocks(model, tokens)
        model(tall)  # a refusal leaves nothing behind
        self.blocks(model, self.made(model, wide))
        assert layers_of(model)[0].encoder.grid == (8, 12)

    @torch.no_grad()
    def test_dense_runs_and_failures_leave_nothing_behind(self, model):
        tall, wide = self.images()
        self.sparse(model, on_unsupported="error")
        expected = model(wide)
        with bsa.dense(model):
            model(tall)
        assert torch.equal(model(wide), expected)
        mask = torch.ones(97, 97, dtype=torch.bool)
        with pytest.raises(bsa.BackendUnavailable, match="an attention mask was passed"):
            model(tall, attn_mask=mask)
        assert torch.equal(model(wide), expected)

    @torch.no_grad()
    def test_an_unknown_grid_is_not_that_of_an_image_that_waits(self):
        model = make("siglip2")
        bsa.sparsify_(model, sparse_plan(model))
        grids = torch.tensor([[4, 8], [8, 4]])
        patches = torch.randn(2, 32, 192)
        embed = next(
            module
            for module in model.modules()
            if type(module).__name__ == "Siglip2VisionEmbeddings"
        )
        embed(patches[:1], grids[:1])
        with pytest.warns(UserWarning, match="may be of any of them"):
            model(patches, pixel_attention_mask=None, spatial_shapes=grids)

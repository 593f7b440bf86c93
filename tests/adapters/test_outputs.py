"""Other outputs of models, in every family: attention weights, hidden states, inputs of hooks."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import bsa_vision as bsa
from bsa_vision.adapters.swap.sparse_layer import layers_of
from tests.adapters import test_torchvision_vit
from tests.helpers import models, sam2_models, sam_models, timm_models
from tests.helpers.errors import relative_error

SMALL = dict(radius=0, block_size=8, tile=(2, 4))
WEIGHTS = "attention weights were requested"
HOOKED = "a forward hook on the module reads its attention weights"
DROPPED = "a hook on attn_drop reads the attention weights"


def local(model, **options):
    return bsa.uniform_plan(model, "local_window", **{**SMALL, **options})


def eager_sam2():
    return sam2_models.make("transformers sam2, eager")


def siglip2_inputs():
    grids = torch.tensor([[8, 8]])
    pixels = nn.functional.unfold(models.image(), 8, stride=8).transpose(1, 2)
    return dict(pixel_values=pixels, pixel_attention_mask=None, spatial_shapes=grids)


EAGER = {
    **{
        name: partial(models.make, name, attn_implementation="eager")
        for name in (*models.MODELS, "sam3")
    },
    **{
        f"transformers {name}": partial(sam_models.make, f"transformers {name}, eager")
        for name in ("sam", "sam_hq")
    },
    "transformers sam2": eager_sam2,
}


def inputs_of(name):
    if name == "siglip2":
        return siglip2_inputs()
    if name == "transformers sam2":
        return dict(pixel_values=sam2_models.image())
    return dict(
        pixel_values=sam_models.image() if "sam" in name and name != "sam3" else models.image()
    )


def configs_of(model):
    return {
        id(x.config): x.config for x in model.modules() if hasattr(x, "config") and not bsa_copy(x)
    }.values()


def bsa_copy(module):
    """Return whether the module's config is the copy of a swapped layer."""
    return "_bsa_layer" in module.__dict__


def ask(model, name, how):
    """Return the outputs with attentions, requested by the argument or in the config."""
    if how == "argument":
        return model(**inputs_of(name), output_attentions=True, output_hidden_states=True)
    for config in configs_of(model):
        config.output_attentions = config.output_hidden_states = True
    return model(**inputs_of(name))


def equal(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


ARGUMENT = [(name, "argument") for name in EAGER]
CONFIG = [
    (name, f"config {when}")
    for name in ("siglip", "dinov3", "transformers sam")
    for when in ("before", "after")
]


@pytest.mark.parametrize(("name", "how"), [*ARGUMENT, *CONFIG])
@torch.no_grad()
def test_attentions_come_from_the_original(name, how):
    model = EAGER[name]()
    dense = model(**inputs_of(name)).last_hidden_state
    expected = ask(copy.deepcopy(model), name, how)
    if "before" in how:
        for config in configs_of(model):
            config.output_attentions = True
    bsa.sparsify_(model, local(model))
    with pytest.warns(UserWarning, match=f"runs its original, dense attention: {WEIGHTS}") as seen:
        got = ask(model, name, how)
    assert equal(got.attentions, expected.attentions)
    assert equal(got.hidden_states, expected.hidden_states)
    # SAM 3's windowed layers run the original.
    layers = [layer for layer in layers_of(model) if not layer.untouched]
    assert all(layer.fallbacks == {WEIGHTS: 1} for layer in layers)
    assert len([warning for warning in seen if WEIGHTS in str(warning.message)]) == len(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ask(model, name, how)  # counted, without another warning
    assert layers[0].fallbacks == {WEIGHTS: 2}
    for config in configs_of(model):
        config.output_attentions = config.output_hidden_states = False
    sparse = model(**inputs_of(name)).last_hidden_state
    assert relative_error(sparse, dense) > 1e-3  # other calls are sparse
    bsa.restore_(model)
    bsa.sparsify_(model, local(model), on_unsupported="error")
    with pytest.raises(bsa.BackendUnavailable, match=WEIGHTS):
        ask(model, name, how)


@pytest.mark.parametrize("name", ["siglip", "dinov3", "clip"])
@torch.no_grad()
def test_attentions_of_layers_that_a_plan_leaves_dense(name):
    model = EAGER[name]()
    expected = model(**inputs_of(name), output_attentions=True).attentions
    bsa.sparsify_(model, bsa.dense_plan(model), on_unsupported="error")  # nothing is unsupported
    assert equal(model(**inputs_of(name), output_attentions=True).attentions, expected)
    bsa.restore_(model)
    bsa.sparsify_(model, local(model, layers=[1]))
    with pytest.warns(UserWarning, match=WEIGHTS):
        assert equal(model(**inputs_of(name), output_attentions=True).attentions, expected)
    assert [len(layer.fallbacks) for layer in layers_of(model)] == [0, 1, 0]
    with bsa.dense(model):
        assert equal(model(**inputs_of(name), output_attentions=True).attentions, expected)


@pytest.mark.parametrize("name", [name for name in EAGER if name != "transformers sam2"])
@torch.no_grad()
def test_a_hook_on_the_module_sees_the_originals_weights(name):
    """Eager attention returns weights; transformers' own permanent hooks are ignored."""
    model, seen = EAGER[name](), []
    model(**inputs_of(name), output_attentions=True)
    layer = bsa.inspect(model).layers[1].name
    hook = model.get_submodule(layer).register_forward_hook(
        lambda module, args, out: seen.append(out[1])
    )
    model(**inputs_of(name))
    bsa.sparsify_(model, local(model))
    # The layer before it runs sparse, so only the shapes are equal.
    with pytest.warns(UserWarning, match=HOOKED), torch.no_grad():
        model(**inputs_of(name))
    assert seen[1].shape == seen[0].shape
    assert [HOOKED in layer.fallbacks for layer in layers_of(model)][:2] == [False, True]
    hook.remove()
    before = dict(layers_of(model)[1].fallbacks)
    model(**inputs_of(name))
    assert layers_of(model)[1].fallbacks == before


def test_hooks_where_there_are_no_weights_to_see():
    model = models.make("vit")  # sdpa
    bsa.sparsify_(model, local(model), on_unsupported="error")
    outs = []
    model.layers[1].attention.register_forward_hook(lambda module, args, out: outs.append(out))
    models.features(model, models.image())
    assert outs[0][1] is None


def test_a_single_layer_compiles():
    """Outside the model's forward, transformers does not collect attentions."""
    model = models.make("vit")
    bsa.sparsify_(model, local(model))
    models.features(model, models.image())
    hidden = torch.randn(1, 65, 48)
    torch.compiler.reset()
    with torch.no_grad():
        expected = model.layers[0](hidden)
        got = torch.compile(model.layers[0], fullgraph=True, backend="aot_eager")(hidden)
    assert relative_error(got, expected) < 1e-5


# Without fused attention, timm passes the weights to the module attn_drop.

TIMM = {
    "Attention": partial(timm_models.make, "vit, not fused"),
    "EvaAttention": partial(timm_models.make, "eva, not fused"),
    "AttentionRope": lambda: unfused(timm_models.make("rope, mixed")),
    "SAM": partial(sam_models.make, "timm, not fused"),
}


def unfused(model, value=False):
    for block in model.blocks:
        block.attn.fused_attn = value
    return model


def maps_of(model):
    from timm.utils import AttentionExtract

    return dict(AttentionExtract(model, method="hook")(timm_models.image()))


@pytest.mark.parametrize("when", ["before the swap", "after the swap"])
@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_attention_maps_of_timm(name, when):
    expected = maps_of(TIMM[name]())
    assert len(expected) > 1
    model = TIMM[name]()
    if when == "after the swap":
        unfused(model, True)
    bsa.sparsify_(model, local(model, tile=(4, 4), block_size=16))
    unfused(model)
    sparse = model(timm_models.image())
    assert not any(layer.fallbacks for layer in layers_of(model))  # no hooks: sparse
    with pytest.warns(UserWarning, match=DROPPED):
        maps = maps_of(model)
    assert maps.keys() == expected.keys()
    assert all(torch.equal(maps[key], expected[key]) for key in expected)
    assert all(layer.fallbacks == {DROPPED: 1} for layer in layers_of(model))
    for block in model.blocks:
        block.attn.attn_drop = nn.Dropout(0.0)
    assert torch.equal(model(timm_models.image()), sparse)  # sparse again
    bsa.restore_(model)
    assert all(block.attn.__dict__["fused_attn"] is False for block in model.blocks)


@torch.no_grad()
def test_maps_with_timms_switch(monkeypatch):
    """A model that was built after timm.layers.set_fused_attn(False)."""
    import timm

    timm.layers.set_fused_attn(False)
    try:
        model = timm_models.make("vit")
    finally:
        timm.layers.set_fused_attn(True)
    bsa.sparsify_(model, local(model), on_unsupported="error")
    model(timm_models.image())
    with pytest.raises(bsa.BackendUnavailable, match=DROPPED):
        maps_of(model)


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_a_module_in_the_place_of_attn_drop(name):
    class Sharpen(nn.Module):
        p = 0.0

        def forward(self, weights):
            return (weights**2) / (weights**2).sum(-1, keepdim=True)

    model = TIMM[name]()
    plain = model(timm_models.image())
    for block in model.blocks:
        block.attn.attn_drop = Sharpen()
    expected = model(timm_models.image())
    assert relative_error(plain, expected) > 1e-3
    bsa.sparsify_(model, local(model))
    with pytest.warns(
        UserWarning, match="attn_drop is a Sharpen, which reads the attention weights"
    ):
        assert torch.equal(model(timm_models.image()), expected)


@torch.no_grad()
def test_fused_attention_hands_no_weights_to_anyone():
    """With fused attention, no hook is called; `fused_attn` can be set on swapped modules."""
    model, seen = timm_models.make("vit"), []
    bsa.sparsify_(model, local(model), on_unsupported="error")
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda *_: seen.append(1))
    model(timm_models.image())
    assert not seen
    unfused(model)
    assert not any(block.attn.fused_attn for block in model.blocks)
    unfused(model, True)
    model(timm_models.image())
    assert all(block.attn.fused_attn for block in bsa.restore_(model).blocks)


@torch.no_grad()
def test_fused_attn_set_on_copies():
    model = timm_models.make("vit")
    bsa.sparsify_(model, local(model))
    other = unfused(copy.deepcopy(model))
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not any(block.attn.fused_attn for block in other.blocks)


# Intermediate features.


@pytest.mark.parametrize("name", ["vit, any size", "eva, dinov3"])
@torch.no_grad()
def test_intermediates_of_timm(name):
    model = timm_models.make(name)
    plan, pixels = local(model), timm_models.image(96, 64)
    bsa.sparsify_(model, plan, on_unsupported="error")
    blocks = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: blocks.append(out))
    _, between = model.forward_intermediates(pixels, norm=False)
    start = model.num_prefix_tokens
    for got, out in zip(between, blocks, strict=True):
        assert torch.equal(got, out[:, start:].transpose(1, 2).unflatten(2, (12, 8)))
    bsa.restore_(model)
    assert relative_error(model.forward_intermediates(pixels, norm=False)[1][1], between[1]) > 1e-3
    bsa.sparsify_(model, plan, backend="reference", on_unsupported="error")
    for got, expected in zip(
        between, model.forward_intermediates(pixels, norm=False)[1], strict=True
    ):
        assert relative_error(got, expected) < 1e-5


def run(model, pixels):
    return model(pixels)


EVERY = {
    **{name: (partial(models.make, name), models.features, models.image) for name in models.MODELS},
    **{
        f"timm, {name}": (partial(timm_models.make, name), run, timm_models.image)
        for name in timm_models.MODELS
    },
    **{
        f"sam, {name}": (partial(sam_models.make, name), sam_models.features, sam_models.image)
        for name in sam_models.MODELS
    },
    **{
        f"sam2, {name}": (partial(sam2_models.make, name), sam2_models.features, sam2_models.image)
        for name in sam2_models.ENCODERS
    },
    "torchvision": (test_torchvision_vit.make, run, test_torchvision_vit.image),
}


class TestShapesThatHooksSee:
    """The shapes of all submodules of an attention are the same as in the original."""

    def shapes(self, model, names, features, image):
        seen, hooks = {}, []

        def note(name, module, args, out):
            seen.setdefault(name, []).append(
                (tuple(args[0].shape) if args else None, tuple(out.shape))
            )

        for layer in names:
            for name, module in model.get_submodule(layer).named_modules():
                if name and not name.endswith("attn_drop"):  # tested above
                    hooks.append(module.register_forward_hook(partial(note, f"{layer}.{name}")))
        features(model, image())
        for hook in hooks:
            hook.remove()
        return seen

    @pytest.mark.parametrize("name", EVERY)
    @torch.no_grad()
    def test_are_the_originals(self, name):
        make, *how = EVERY[name]
        model = make()
        names = [layer.name for layer in bsa.inspect(model).layers]
        expected = self.shapes(model, names, *how)
        assert bool(expected) == (name != "torchvision")  # its out_proj is not called
        bsa.sparsify_(model, bsa.dense_plan(model), backend="gather", on_unsupported="error")
        assert self.shapes(model, names, *how) == expected
